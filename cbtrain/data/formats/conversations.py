"""Conversations of a row's fields: of lists of messages, of a question and its answer, of a dialogue in one text."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from cbtrain.data.formats.labels import Label
from cbtrain.data.formats.messages import Message, is_parts, messages_of, role_of, text_of


@dataclass(frozen=True)
class Conversation:
    """What a row holds, or one of the conversations in it."""

    messages: list[Message]
    label: Label | None = None
    """Its side where the shape tells it; None leaves it to the row's own label."""
    odd: Counter[str] = field(default_factory=Counter)
    """What text cannot carry, by kind."""


@dataclass(frozen=True)
class Choices:
    """What a user chose of rows that hold more than one answer."""

    preference: Literal["chosen", "rejected"] | None = None
    refusals: bool = False
    """Whether the refusals of circuit-breakers rows are asked for, in place of their harmful answers."""


def pair(
    prompt: object,
    answer: object,
    where: str,
    names: tuple[str, str] = ("prompt", "completion"),
    label: Label | None = None,
) -> Conversation:
    """A question and its answer, of which either may be the parts of a message; the question also a dialogue in one
    string, as HH-RLHF writes it."""
    odd = Counter[str]()
    if is_parts(prompt) or is_parts(answer):
        parts = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Conversation(messages_of(parts, where, odd), label, odd)
    asked, said = text_of(prompt, f"{where}: {names[0]}"), text_of(answer, f"{where}: {names[1]}")
    before = dialogue(asked)
    if before and before[-1]["role"] == "assistant" and not before[-1]["content"].strip():
        before = before[:-1]
    turns: list[Message] = before or [{"role": "user", "content": asked}]
    return Conversation([*turns, {"role": "assistant", "content": said}], label)


def holds_messages(*values: object) -> bool:
    """Whether any of the values is a list of messages."""
    return any(isinstance(v, list) and v and isinstance(v[0], dict) and {"role", "from"} & v[0].keys() for v in values)


def turns_of(values: object, where: str, name: str = "messages") -> Conversation:
    odd = Counter[str]()
    return Conversation(messages_of(values, where, odd, name), odd=odd)


def a_user_asks(turns: list[Any]) -> bool:
    """Whether a user speaks among messages."""
    return any(role_of(turn) == "user" for turn in turns if isinstance(turn, dict))


def dialogue(text: str) -> list[Message]:
    """The turns of HH-RLHF's one string, `\\n\\nHuman: … \\n\\nAssistant: …`; none where it is not of that form."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if parts[0].strip() or "Human" not in parts[1::2]:
        return []
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
