"""Where the question, the answer and the tool results stand in a rendered row: what truncation goes by.

Nothing is known of a template here. A turn begins where the rendering of the turns before it ends. The text of a tool
result is what changes when another text is put in its place, so the marks that a template writes around it, and
quotes where it writes JSON, are never part of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cbtrain.data.formats.messages import Message
from cbtrain.data.templates.chat_template import TEMPLATE_ERRORS, ChatTemplate, Rendering
from cbtrain.data.templates.parts import replaced_text
from cbtrain.data.templates.spans import Span, common_prefix
from cbtrain.data.templates.template_fallbacks import TOOL_RESULT


@dataclass(frozen=True)
class Turns:
    """Places in a row, as characters of its text or as tokens. The default says that none is known."""

    question: Span = (0, 0)
    """The last user turn before the first scored one, with the marks around it."""
    answer: int = 0
    """Where the first scored turn begins, with the marks before it."""
    tool_results: tuple[Span, ...] = ()
    """The texts of the tool results after the question."""


def find_turns(rendering: Rendering, template: ChatTemplate) -> Turns:
    """The places in the rendering's characters, as far as the template lets them be told."""
    messages, answer = rendering.messages, rendering.first_scored
    asking = [i for i, message in enumerate(messages[:answer]) if message["role"] == "user" and not _is_result(message)]
    if not asking:
        return Turns()
    question = asking[-1]
    begin, end, answered = (
        _beginning(messages[:turn], rendering.text, template) for turn in (question, question + 1, answer)
    )
    results = tuple(_results(messages, question, rendering.text, template))
    scored = rendering.spans[0][0] if rendering.spans else 0
    # A template that rewrites earlier turns, or refuses a part of them, says nothing of where they end.
    known = begin < end <= answered <= scored
    return Turns((begin, end), answered, results) if known else Turns(tool_results=results)


def _beginning(before: Sequence[Message], text: str, template: ChatTemplate) -> int:
    """Where the turn after `before` begins in `text`; 0 where that cannot be told."""
    if not before:
        return 0
    try:
        return common_prefix(template.text(before), text)
    except TEMPLATE_ERRORS:
        return 0


def _results(messages: Sequence[Message], question: int, text: str, template: ChatTemplate) -> Iterator[Span]:
    for turn in range(question + 1, len(messages)):
        if not _is_result(messages[turn]):
            continue
        if place := replaced_text(messages, turn, text, template):
            yield place


def _is_result(message: Message) -> bool:
    return message["role"] == "tool" or TOOL_RESULT in message
