"""How much of each part of a conversation is scored: of the text, the calls and the thoughts of each role."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cbtrain.data.formats.messages import Message
from cbtrain.data.templates.chat_template import Rendering
from cbtrain.data.templates.spans import Span, encodable
from cbtrain.data.templates.template_fallbacks import CALLS_AS_TEXT

_END_OF_THOUGHT = "</think>"


def scored_parts(rendering: Rendering) -> Counter[tuple[str, bool]]:
    """Characters of the rendering by part (`assistant text`, `assistant calls`, `tool text`), scored and not.

    A part that the template does not write as the row has it (escaped, rewritten) is not found, and not counted; a call
    counts from its name to the last of its arguments that is found.
    """
    spans = [(0, len(rendering.text))] if rendering.spans is None else rendering.spans
    counts: Counter[tuple[str, bool]] = Counter()
    position = 0
    for message in rendering.messages:
        for kind, pieces in _pieces(message):
            start = None
            for piece in pieces:
                found = rendering.text.find(piece, position) if piece else -1
                if found >= 0:
                    start, position = found if start is None else start, found + len(piece)
            if start is not None:
                scored = sum(_common((start, position), span) for span in spans)
                counts[f"{message['role']} {kind}", True] += scored
                counts[f"{message['role']} {kind}", False] += position - start - scored
    return counts


def _pieces(message: Message) -> Iterator[tuple[str, list[str]]]:
    """Parts of a message in the order in which templates write them, each as texts that follow each other."""
    content = encodable(message["content"])
    thought, end, said = content.rpartition(_END_OF_THOUGHT)
    if end and message["role"] == "assistant":
        yield "thoughts", [thought.strip()]
        content = said
    calls = [encodable(call) for call in message.get(CALLS_AS_TEXT, ())]
    for call in calls:
        before, _, content = content.partition(call)
        yield "text", [before.strip()]
        yield "calls", [call]
    yield "text", [content.strip()]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        yield "calls", [encodable(function["name"]), *map(encodable, _values(function["arguments"]))]


def _values(arguments: Any) -> Iterator[str]:
    """The texts and numbers among a call's arguments."""
    if isinstance(arguments, Mapping):
        for value in arguments.values():
            yield from _values(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from _values(value)
    elif isinstance(arguments, str | int | float) and not isinstance(arguments, bool):
        yield str(arguments)


def _common(a: Span, b: Span) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
