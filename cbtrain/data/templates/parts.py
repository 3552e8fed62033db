"""How much of each part of a conversation is scored: of the text, the calls and the thoughts of each role.

A part of a turn is what changes in the rendering when another stands in its place, so that a word is never taken for
the same word in a role's header, an end mark or another turn.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from cbtrain.data.formats.messages import Message
from cbtrain.data.templates.chat_template import TEMPLATE_ERRORS, ChatTemplate, Rendering
from cbtrain.data.templates.spans import END_OF_THOUGHT, Span, common_prefix, encodable
from cbtrain.data.templates.template_fallbacks import CALLS_AS_TEXT

_OTHER_TEXT, _OTHER_NAME, _OTHER_VALUE = "result7x", "name7x", "value7x"
Part = tuple[str, bool]
"""`assistant calls`, say, and whether it is the scored share."""


def scored_parts(rendering: Rendering, template: ChatTemplate) -> Counter[Part]:
    """Characters of a rendering, scored and not, by part; one that the template lets nobody tell is not counted."""
    spans = [(0, len(rendering.text))] if rendering.spans is None else rendering.spans
    counts: Counter[Part] = Counter()
    for turn, message in enumerate(rendering.messages):
        for kind, (start, stop) in _parts(rendering.messages, turn, rendering.text, template):
            scored = sum(max(0, min(stop, end) - max(start, begin)) for begin, end in spans)
            counts[f"{message['role']} {kind}", True] += scored
            counts[f"{message['role']} {kind}", False] += stop - start - scored
    return counts


def replaced_text(messages: Sequence[Message], turn: int, text: str, template: ChatTemplate) -> Span | None:
    """Where `text`, the rendering of `messages`, holds the content of a turn; None where that cannot be told."""
    other = messages[turn] | {"content": _OTHER_TEXT}
    try:
        changed = template.text([*messages[:turn], other, *messages[turn + 1 :]])
    except TEMPLATE_ERRORS:
        return None
    before, _, behind = changed.rpartition(_OTHER_TEXT)
    start, stop = len(before), len(text) - len(behind)
    # Nothing else may change with it, or what lies between is more than its text.
    return (start, stop) if start < stop and text.startswith(before) and text.endswith(behind) else None


def _parts(messages: Sequence[Message], turn: int, text: str, template: ChatTemplate) -> Iterator[tuple[str, Span]]:
    """The parts of a turn and where they stand."""
    message = messages[turn]
    if message["content"].strip() and (said := replaced_text(messages, turn, text, template)):
        start, stop = said
        thought = text.rfind(END_OF_THOUGHT, start, stop)
        if message["role"] == "assistant" and thought >= 0:
            yield "thoughts", (start, thought)
            start = thought + len(END_OF_THOUGHT)
        for call in map(encodable, message.get(CALLS_AS_TEXT, ())):
            place = text.find(call, start, stop)
            if place >= 0:
                yield "text", (start, place)
                yield "calls", (place, place + len(call))
                start = place + len(call)
        yield "text", (start, stop)
    if message.get("tool_calls") and (called := _replaced_calls(messages, turn, text, template)):
        yield "calls", called


def _replaced_calls(messages: Sequence[Message], turn: int, text: str, template: ChatTemplate) -> Span | None:
    """Where `text` holds the calls of a turn, from the first character that tells them from others to the last."""
    function = {"name": _OTHER_NAME, "arguments": {_OTHER_NAME: _OTHER_VALUE}}
    others = [call | {"function": function} for call in messages[turn]["tool_calls"]]
    other = messages[turn] | {"tool_calls": others}
    try:
        changed = template.text([*messages[:turn], other, *messages[turn + 1 :]])
    except TEMPLATE_ERRORS:
        return None
    start = common_prefix(changed, text)
    alike = common_prefix(changed[start:][::-1], text[start:][::-1])
    return (start, len(text) - alike) if start < len(text) - alike else None
