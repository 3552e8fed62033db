"""Rows to text: the tokenizer's chat template, and which characters of it are scored.

What the assistant said in a turn is where the template marks it by `{% generation %}`. In a template without such
marks, and in a turn of which it marks nothing, it is found by rendering prefixes: what `messages[:i]` with a
generation prompt does not say and `messages[:i + 1]` does. That holds for any template, with no marker of it known
here. A turn's tool calls are what stands in it between its text and its end.

Templates differ in what they can render. A row is tried as it is; where the template raises, or silently leaves out
a text, a call or a tool's answer, it is rewritten step by step (`template_fallbacks.py`).
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from cbtrain.config import InputError, MaskPolicy
from cbtrain.data.formats.messages import Message
from cbtrain.data.formats.rows import Row
from cbtrain.data.loss_mask import ends_on_nothing, scored_turns
from cbtrain.data.templates.clock import asks_for_the_time, stopped_clock
from cbtrain.data.templates.spans import (
    THOUGHTS,
    Shape,
    Span,
    behind_empty_thought,
    common_prefix,
    encodable,
    lost_part,
    marked_conversation,
    overlap,
    shape_of,
    words,
)
from cbtrain.data.templates.template_fallbacks import CALLS_AS_TEXT, FORMS, TOOL_RESULT
from cbtrain.utils.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime.date(2024, 7, 26)
"""What templates take for today where no other is given; Llama 3.1's own."""
OPTIONS: dict[str, Any] = {"enable_thinking": False}
"""Given to every template: no thinking, so that an empty thought belongs to the prompt and is not scored."""
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError)
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
EARLIER = "an earlier turn is scored, as the last one is empty"
CLIPPED = "the template's marks clipped to what the assistant says"
_ENDS_IN_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
_SAID = "said7x"
"""Stands for the text of a turn, to see what a template writes behind it."""


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and the scored character ranges `(start, stop)` in it; None is all of it."""

    text: str
    spans: tuple[Span, ...] | None
    rewritten: tuple[str, ...] = ()
    """What is otherwise than the row has it."""
    messages: Sequence[Message] = ()
    """The turns that were rendered."""
    first_scored: int = 0
    """Which of them is the first scored one; 0 where no turn is scored as such."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        date: what it writes for today.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: datetime.date = DATE) -> None:
        self._options = OPTIONS | {"date_string": date.strftime("%d %b %Y")}
        self._tokenizer = tokenizer
        self._shown: dict[Shape, bool] = {}
        self._opens: dict[Shape, bool] = {}
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template: put a "
                "chat_template.jinja beside it, or name another with --tokenizer"
            )
        self._template = tokenizer.get_chat_template()
        if asks_for_the_time(self._template):
            stopped, formats = stopped_clock(self._template, date)
            self._options |= {"stopped_clock": formats, "chat_template": stopped}
            self._template = stopped
        self._marks_turns = bool(_GENERATION_MARK.search(self._template))

    def render(self, row: Row, policy: MaskPolicy) -> Rendering | None:
        """The row's text with the characters that `policy` scores; None where it scores nothing.

        Assistant turns that say nothing, and those before the first user turn, are context and never scored.
        Turns after the last scored one are cut, except under `full_sequence`.

        Raises:
            InputError: the template cannot render the row in any form; names its file and line.
        """
        problem: object = "it leaves out a part of every form of the row"
        for form in FORMS:
            messages = form.rewrite(row.messages)
            turns = None if policy == "full_sequence" else scored_turns(messages, policy)
            if turns is not None:
                if not turns:
                    return None
                messages = messages[: turns[-1] + 1]
            try:
                if self._shows_everything(messages):
                    text = self.text(messages)
                    if turns is None:
                        return Rendering(text, None, form.changes, messages)
                    spans, left_out = self._verified_spans(messages, turns, text, policy)
                    earlier = (EARLIER,) if policy == "completion_only" and ends_on_nothing(row.messages) else ()
                    return Rendering(text, spans, form.changes + left_out + earlier, messages, turns[0])
            except TEMPLATE_ERRORS as error:
                problem = error
        reason = " ".join(str(problem).split())
        raise InputError(f"{row.source}: the tokenizer's chat template refuses the row ({reason})")

    def prompt(self, text: str, source: str) -> str:
        """A user's text up to where the assistant answers.

        Raises:
            InputError: the template refuses it; names `source`.
        """
        return self.opened([{"role": "user", "content": text}], source)

    def opened(self, messages: Sequence[Message], source: str) -> str:
        """A conversation up to where the assistant answers.

        Raises:
            InputError: the template refuses it; names `source`.
        """
        try:
            return self._up_to_answer(messages)
        except TEMPLATE_ERRORS as error:
            reason = first_line(error)
            raise InputError(f"{source}: the tokenizer's chat template refuses the prompt ({reason})") from None

    def _up_to_answer(self, messages: Sequence[Message]) -> str:
        """What the template writes for `messages` and in front of an answer to them.

        A template that opens no turn when asked to writes what two answers have in common; else a role's header would
        be taken for the assistant's words.
        """
        opened = self.text(messages, add_generation_prompt=True)
        shape = shape_of(messages)
        if shape not in self._opens:
            self._opens[shape] = opened != self.text(messages)
        if self._opens[shape]:
            return opened
        try:
            answers = [self.text([*messages, {"role": "assistant", "content": said}]) for said in (_SAID, _SAID[::-1])]
        except TEMPLATE_ERRORS:
            return opened
        # Blanks before an answer belong to its first token, and an empty thought to an answer without one.
        return _ENDS_IN_EMPTY_THOUGHT.sub("", answers[0][: common_prefix(*answers)]).rstrip(" ")

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """What the template writes for `messages`, or one of `TEMPLATE_ERRORS`."""
        text = self._tokenizer.apply_chat_template(
            [_shown_to_template(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._options,
        )
        return encodable(str(text))

    def _verified_spans(
        self, messages: Sequence[Message], turns: Sequence[int], text: str, policy: MaskPolicy
    ) -> tuple[tuple[Span, ...], tuple[str, ...]]:
        """The scored characters, which hold what the assistant says in `turns`; and what the template left out of it.

        Marks are taken where they hold it, else prefixes tell.
        """
        ways = [self._by_prefixes]
        if policy == "tool_calls_only":
            ways = [self._by_calls]
        elif self._marks_turns:
            ways = [self._by_marks, self._by_prefixes]
        for way in ways:
            by_turn, clipped = way(messages, turns, text), set[str]()
            if way == self._by_marks:
                by_turn, clipped = self._clipped(by_turn, messages, turns, text)
            by_turn = [[behind_empty_thought(span, text) for span in spans] for spans in by_turn]
            said = ["".join(text[start:stop] for start, stop in spans) for spans in by_turn]
            lost = {lost_part(messages[turn], words, policy) for turn, words in zip(turns, said, strict=True)}
            if lost <= {"", THOUGHTS}:
                return tuple(span for spans in by_turn for span in spans), (*filter(None, lost), *clipped)
        raise ValueError(f"{', '.join(sorted(filter(None, lost)))} cannot be found in what it writes")

    def _by_calls(self, messages: Sequence[Message], turns: Sequence[int], text: str) -> list[list[Span]]:
        return [self._call_spans(messages, turn, text) for turn in turns]

    def _by_prefixes(self, messages: Sequence[Message], turns: Sequence[int], text: str) -> list[list[Span]]:
        return [[self._span(messages, turn, text)] for turn in turns]

    def _clipped(
        self, by_turn: list[list[Span]], messages: Sequence[Message], turns: Sequence[int], text: str
    ) -> tuple[list[list[Span]], set[str]]:
        """Marks without what is not the assistant's: published training templates mark role headers and empty thoughts.

        Where prefixes cannot tell, the marks stay.
        """
        kept, clipped = list[list[Span]](), set[str]()
        for turn, spans in zip(turns, by_turn, strict=True):
            try:
                first, last = self._span(messages, turn, text)
            except TEMPLATE_ERRORS:
                kept.append(spans)
                continue
            own = [(max(start, first), min(stop, last)) for start, stop in spans]
            kept.append([(start, stop) for start, stop in own if start < stop])
            if words(text, kept[-1]) != words(text, spans):
                clipped.add(CLIPPED)
        return kept, clipped

    def _by_marks(self, messages: Sequence[Message], turns: Sequence[int], text: str) -> list[list[Span]]:
        marks = self._marks(messages)
        by_turn: list[list[Span]] = []
        for turn in turns:
            before, behind = (len(self._marks(messages[:end])) for end in (turn, turn + 1))
            said = [(start, stop) for start, stop in marks[before:behind] if text[start:stop].strip()]
            by_turn.append(said or [self._span(messages, turn, text)])
        return by_turn

    def _marks(self, messages: Sequence[Message]) -> list[Span]:
        """The character ranges that the template itself marks as generated, in their order."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = self._tokenizer.special_tokens_map | self._options | {"chat_template": self._template}
        conversations = [[_shown_to_template(message) for message in messages]]
        _, marks = render_jinja_template(conversations, return_assistant_tokens_mask=True, **options)
        return list(marks[0])

    def _span(self, messages: Sequence[Message], turn: int, text: str) -> Span:
        """Where `text`, the rendering of all `messages`, holds what the assistant says in `turn`."""
        prompt = self._up_to_answer(messages[:turn])
        start = common_prefix(prompt, text)
        # A generation prompt may open a thought that the row does not have; the turns before it must agree.
        if start < len(prompt) and not text.startswith(self.text(messages[:turn]).rstrip()):
            raise ValueError("it rewrites earlier turns; try another --mask-policy")
        if turn == len(messages) - 1:
            return start, len(text)
        spoken = self.text(messages[: turn + 1])[start:]
        length = overlap(spoken, text[start:])
        if not text[start : start + length].strip():
            raise ValueError("it rewrites earlier turns; try another --mask-policy")
        return start, start + length

    def _call_spans(self, messages: Sequence[Message], turn: int, text: str) -> list[Span]:
        """Where `text` holds the tool calls of `turn`, without the end of the turn."""
        start, stop = self._span(messages, turn, text)
        spans: list[Span] = []
        for call in messages[turn].get(CALLS_AS_TEXT) or [self._calls(messages[: turn + 1])]:
            call = encodable(call)
            place = text.find(call, start, stop)
            if place < 0 or not call:
                raise ValueError("its tool calls cannot be told from the rest of the turn; try another --mask-policy")
            # White space behind a call is not scored, but may share a token with its end.
            start = stop - len(text[place + len(call) : stop].lstrip())
            spans.append((place, start))
        return spans

    def _calls(self, messages: Sequence[Message]) -> str:
        """What the template writes for the tool calls of the last of `messages`."""
        *before, turn = messages
        ending = self.text([*before, {"role": turn["role"], "content": _SAID}]).rpartition(_SAID)[2]
        if turn["content"].strip():
            behind = self.text([*before, turn | {"content": _SAID}]).rpartition(_SAID)[2]
        else:
            whole = self.text(messages)
            behind = whole[common_prefix(self._up_to_answer(before), whole) :]
        return behind.removesuffix(ending).strip()

    def _shows_everything(self, messages: Sequence[Message]) -> bool:
        """Whether the template renders every part of a conversation of this shape, tried with marks for its texts."""
        shape = shape_of(messages)
        if shape not in self._shown:
            marked, marks = marked_conversation(shape)
            try:
                text = self.text(marked)
            except TEMPLATE_ERRORS:
                # Left to the row itself, whose error says more.
                return True
            self._shown[shape] = all(mark in text for mark in marks)
        return self._shown[shape]


def _shown_to_template(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in (CALLS_AS_TEXT, TOOL_RESULT)}
