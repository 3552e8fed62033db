"""Rows to text: the tokenizer's chat template, and which characters of it the assistant wrote.

The assistant's part of a rendering is found by rendering prefixes: what `messages[:i]` with a generation prompt does
not say and `messages[:i + 1]` does. That holds for any template, with no marker of it known here.

Templates differ in what they can render. A row is tried as it is; where the template raises, or silently leaves out
a text, a call or a tool's answer, it is rewritten step by step (see `_FORMS`): tool calls as text in the
assistant's content, tool answers as user turns, consecutive turns of a role joined, the system turn put before the
first user turn.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from cbtrain.config import InputError, MaskPolicy
from cbtrain.rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
"""Variables given to every template: a fixed date, so that a row's tokens do not change overnight, and no thinking,
so that an empty thought belongs to the prompt and is not scored."""

_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError)


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and the scored character ranges `(start, stop)` in it; None is all of it."""

    text: str
    spans: tuple[tuple[int, int], ...] | None


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._shown: dict[tuple[object, ...], bool] = {}
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template: put a "
                "chat_template.jinja beside it, or name another with --tokenizer"
            )

    def render(self, row: Row, policy: MaskPolicy) -> Rendering | None:
        """The row's text with the characters that `policy` scores; None where it scores nothing.

        Assistant turns that say nothing, and those before the first user turn, are context and never scored.
        Turns after the last scored one are cut, except under `full_sequence`.

        Raises:
            InputError: the template cannot render the row in any form; names its file and line.
        """
        problem: object = "it leaves out a part of every form of the row"
        for form in _FORMS:
            messages = form(row.messages)
            turns = None if policy == "full_sequence" else _scored_turns(messages, policy)
            if turns is not None:
                if not turns:
                    return None
                messages = messages[: turns[-1] + 1]
            try:
                if self._shows_everything(messages):
                    return self._render(messages, turns)
            except _TEMPLATE_ERRORS as error:
                problem = error
        reason = " ".join(str(problem).split())
        raise InputError(f"{row.source}: the tokenizer's chat template refuses the row ({reason})")

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_OPTIONS
        )
        # Half of a surrogate pair is valid in JSON but not in UTF-8, which tokenizers read.
        return str(text).encode("utf-8", "replace").decode("utf-8")

    def _render(self, messages: Sequence[Message], turns: Sequence[int] | None) -> Rendering:
        text = self._text(messages)
        return Rendering(text, None if turns is None else tuple(self._span(messages, turn, text) for turn in turns))

    def _span(self, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
        """Where `text`, the rendering of all `messages`, holds what the assistant says in `turn`."""
        prompt = self._text(messages[:turn], add_generation_prompt=True)
        start = _common_prefix(prompt, text)
        # A generation prompt may open a thought that the row does not have; the turns before it must agree.
        if start < len(prompt) and not text.startswith(self._text(messages[:turn]).rstrip()):
            raise ValueError("it rewrites earlier turns; try another --mask-policy")
        if turn == len(messages) - 1:
            return start, len(text)
        spoken = self._text(messages[: turn + 1])[start:]
        length = _overlap(spoken, text[start:])
        if not text[start : start + length].strip():
            raise ValueError("it rewrites earlier turns; try another --mask-policy")
        return start, start + length

    def _shows_everything(self, messages: Sequence[Message]) -> bool:
        """Whether the template renders every part of a conversation of this shape, tried with marks for its texts."""
        shape = tuple((m["role"], bool(m["content"].strip()), len(m.get("tool_calls", ()))) for m in messages)
        if shape not in self._shown:
            marked, marks = _marked(shape)
            try:
                text = self._text(marked)
            except _TEMPLATE_ERRORS:
                # Left to the row itself, whose error says more.
                return True
            self._shown[shape] = all(mark in text for mark in marks)
        return self._shown[shape]


def _scored_turns(messages: Sequence[Message], policy: MaskPolicy) -> list[int]:
    roles = [message["role"] for message in messages]
    first_user = roles.index("user") if "user" in roles else len(roles)
    turns = [
        i
        for i, message in enumerate(messages)
        if i > first_user
        and message["role"] == "assistant"
        and (message["content"].strip() or message.get("tool_calls"))
    ]
    return turns[-1:] if policy == "completion_only" else turns


def _overlap(spoken: str, text: str) -> int:
    """How much of the start of `text` is the turn that, were it the last one, would be written `spoken`.

    All of it, for most templates. Some write the last turn with more in front (an empty thought): then it is the
    longest end of `spoken`; some with more behind (an end of text): then it is their common start.
    """
    if text.startswith(spoken):
        return len(spoken)
    ends = (k for k in range(len(spoken)) if spoken[k] == text[:1] and text.startswith(spoken[k:]))
    longest_end = len(spoken) - next(ends, len(spoken))
    return max(longest_end, _common_prefix(spoken, text))


def _common_prefix(a: str, b: str) -> int:
    """How many characters `a` and `b` have in common at their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _marked(shape: tuple[tuple[str, bool, int], ...]) -> tuple[list[Message], list[str]]:
    """A conversation of the given shape whose every part is a word of its own, and these words."""
    messages: list[Message] = []
    marks: list[str] = []
    for i, (role, speaks, calls) in enumerate(shape):
        message: Message = {"role": role, "content": f"said{i}x" if speaks else ""}
        marks += [f"said{i}x"] * speaks
        for j in range(calls):
            function = {"name": f"name{i}x{j}x", "arguments": {"key": f"value{i}x{j}x"}}
            # Nine letters and digits: Mistral's templates accept no other id.
            call = {"id": f"{i:04}{j:05}", "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
            marks += [f"name{i}x{j}x", f"value{i}x{j}x"]
        if role == "tool":
            message["tool_call_id"] = f"{i:09}"
        messages.append(message)
    return messages, marks


def _as_is(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _calls_as_text(messages: Sequence[Message]) -> list[Message]:
    rewritten = []
    for message in messages:
        calls = [json.dumps(_named(call), ensure_ascii=False) for call in message.get("tool_calls", ())]
        lines = [message["content"], *calls] if message["content"].strip() else calls
        content = "\n".join(lines) if calls else message["content"]
        rewritten.append({key: value for key, value in message.items() if key != "tool_calls"} | {"content": content})
    return rewritten


def _named(call: Message) -> Message:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _tools_as_users(messages: Sequence[Message]) -> list[Message]:
    return [
        {"role": "user", "content": message["content"]} if message["role"] == "tool" else message
        for message in _calls_as_text(messages)
    ]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Consecutive user turns as one, and consecutive assistant turns without calls as one."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        plain = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if last and plain and last["role"] == message["role"] and "tool_calls" not in last:
            turns[-1] = last | {"content": f"{last['content']}\n\n{message['content']}"}
        else:
            turns.append(message)
    return turns


def _system_into_user(messages: Sequence[Message]) -> list[Message]:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    for i, message in enumerate(turns):
        if message["role"] == "user":
            turns[i] = message | {"content": f"{system}\n\n{message['content']}" if system else message["content"]}
            break
    return turns


_Form = Callable[[Sequence[Message]], Sequence[Message]]


def _composed(tools: _Form, system: _Form, joined: _Form) -> _Form:
    return lambda messages: joined(system(tools(messages)))


_FORMS: list[_Form] = [
    _composed(*steps)
    for steps in itertools.product(
        (_as_is, _calls_as_text, _tools_as_users), (_as_is, _system_into_user), (_as_is, _joined)
    )
]
"""Ways to write a row, from as it is to the plainest; the first that the template renders whole is used."""
