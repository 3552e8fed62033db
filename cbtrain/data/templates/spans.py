"""Character ranges of a rendered conversation, and what of an assistant's turn is in them."""

import re
from collections.abc import Sequence

from cbtrain.config import MaskPolicy
from cbtrain.data.formats.messages import Message

Span = tuple[int, int]
"""Start and stop of a range of characters."""
Shape = tuple[tuple[str, bool, int], ...]
"""Of each turn its role, whether it speaks and how often it calls."""
_THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
THOUGHTS = "thoughts left out"
"""What some templates make of the text up to an end of thought."""


def words(text: str, spans: Sequence[Span]) -> str:
    """What ranges hold, without white space."""
    return "".join("".join(text[start:stop].split()) for start, stop in spans)


def behind_empty_thought(span: Span, text: str) -> Span:
    """A span without an empty thought at its start, which says nothing and is the same on both sides."""
    start, stop = span
    match = _EMPTY_THOUGHT.match(text, start, stop)
    return (match.end(), stop) if match and match.end() < stop else span


def lost_part(message: Message, scored: str, policy: MaskPolicy) -> str:
    """What of an assistant turn is not in the text that is scored for it; empty where all of it is.

    White space is not compared, as templates trim it.
    """
    scored = " ".join(scored.split())

    def holds(text: str) -> bool:
        return " ".join(encodable(text).split()) in scored

    if not all(holds(call["function"]["name"]) for call in message.get("tool_calls", ())):
        return "a tool call"
    if policy == "tool_calls_only" or holds(message["content"]):
        return ""
    before, _, behind = message["content"].rpartition(END_OF_THOUGHT)
    if not holds(behind):
        return "what the assistant says"
    thought = before.rpartition(_THOUGHT)[2]
    return "" if thought.strip() and holds(thought) else THOUGHTS


def encodable(text: str) -> str:
    """Half of a surrogate pair is valid in JSON but not in UTF-8, which tokenizers read."""
    return text.encode("utf-8", "replace").decode("utf-8")


def overlap(spoken: str, text: str) -> int:
    """How much of the start of `text` is the turn that, were it the last one, would be written `spoken`.

    All of it, for most templates. Some write the last turn with more in front (an empty thought): then it is the
    longest end of `spoken`; some with more behind (an end of text): then it is their common start.
    """
    if text.startswith(spoken):
        return len(spoken)
    ends = (k for k in range(len(spoken)) if spoken[k] == text[:1] and text.startswith(spoken[k:]))
    longest_end = len(spoken) - next(ends, len(spoken))
    return max(longest_end, common_prefix(spoken, text))


def without_thoughts(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with assistant turns from behind their thoughts on."""
    return tuple(
        message | {"content": message["content"].rpartition(END_OF_THOUGHT)[2].lstrip()}
        if message["role"] == "assistant" and END_OF_THOUGHT in message["content"]
        else message
        for message in messages
    )


def common_prefix(a: str, b: str) -> int:
    """How many characters `a` and `b` have in common at their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shape_of(messages: Sequence[Message]) -> Shape:
    """The shape of a conversation."""
    return tuple((m["role"], bool(m["content"].strip()), len(m.get("tool_calls", ()))) for m in messages)


def marked_conversation(shape: Shape) -> tuple[list[Message], list[str]]:
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
