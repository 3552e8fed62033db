"""Rendered rows to tokens: ids, the mask of scored tokens, and where turns stand among them."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from cbtrain.data.templates.chat_template import Rendering
from cbtrain.data.templates.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 256
"""Renderings a call of the tokenizer: in parallel, without holding the offsets of a whole data set."""


@dataclass(frozen=True)
class TokenRow:
    """One conversation as tokens."""

    input_ids: tuple[int, ...]
    scored: tuple[bool, ...]
    """Per token, whether the mask policy scores it."""
    prompt: str
    """The first user turn, normalised: the split keeps its rows together."""
    source: str
    """`file:line`."""

    @property
    def place(self) -> tuple[str, int]:
        """`source` as file and line, which sort as the rows stand."""
        file, _, line = self.source.rpartition(":")
        return file, int(line)

    @property
    def scored_tokens(self) -> int:
        return sum(self.scored)

    @property
    def scored_predictions(self) -> int:
        """Scored tokens that have a token before them to be predicted from."""
        return sum(self.scored[1:])


def tokenize(
    renderings: Sequence[Rendering], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of each rendering and whether each token is scored. The template has already written special tokens."""
    for start in range(0, len(renderings), _AT_ONCE):
        chunk = renderings[start : start + _AT_ONCE]
        encoded = tokenizer(
            [rendering.text for rendering in chunk],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        for i, rendering in enumerate(chunk):
            ids = encoded["input_ids"][i]
            if rendering.spans is None:
                yield ids, [True] * len(ids)
                continue
            offsets = encoded["offset_mapping"][i] if tokenizer.is_fast else _span_offsets(rendering, ids, tokenizer)
            yield ids, _scored(rendering, offsets)


def turns_in_tokens(
    turns: Turns, rendering: Rendering, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> Turns:
    """The places that `turns` names in the rendering's text, as places in its `ids`.

    A token that joins the marks around a tool result with its text is none of the result's.
    """
    begin, end = turns.question
    if tokenizer.is_fast:
        encoded = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
    else:
        edges = {begin, end, turns.answer, *(edge for span in turns.tool_results for edge in span)}
        offsets = _offsets(rendering.text, edges, ids, tokenizer)

    def reaching(character: int) -> int:
        return bisect_right(offsets, character, key=itemgetter(1))

    # Where the tokenizer does not tell offsets, the first token after an edge may be one that the edge cuts apart.
    spare = 0 if tokenizer.is_fast else 1
    results = ((bisect_left(offsets, a, key=itemgetter(0)) + spare, reaching(b)) for a, b in turns.tool_results)
    return Turns((reaching(begin), reaching(end)), reaching(turns.answer), tuple((a, b) for a, b in results if a < b))


def _scored(rendering: Rendering, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Per token, whether it says something of a scored range.

    A token that joins the end of the prompt with the start of an answer is part of the answer. White space that a
    template puts behind the end of a turn is not: no model writes it.
    """
    scored = [False] * len(offsets)
    for start, stop in rendering.spans or ():
        said = _end_of_words(rendering.text, start, stop)
        first = bisect_right(offsets, start, key=itemgetter(1))
        behind = min(bisect_left(offsets, said, key=itemgetter(0)), bisect_right(offsets, stop, key=itemgetter(1)))
        scored[first:behind] = [True] * (behind - first)
    return scored


def _end_of_words(text: str, start: int, stop: int) -> int:
    """Where the white space begins that ends `text[start:stop]`."""
    return start + len(text[start:stop].rstrip())


def _span_offsets(
    rendering: Rendering, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, int]]:
    """Characters of each token, as far as the scored ranges need it."""
    edges: set[int] = set()
    for start, stop in rendering.spans or ():
        edges |= {start, _end_of_words(rendering.text, start, stop), stop}
    return _offsets(rendering.text, edges, ids, tokenizer)


def _offsets(
    text: str, edges: Set[int], ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, int]]:
    """Characters of each token, as far as `edges` need it, for a tokenizer that does not tell.

    The tokens of a prefix of the text are the first tokens of the text, but for one that its end cuts apart.
    """
    ordered = sorted({0, len(text)} | edges)
    positions: list[int] = []
    for edge in ordered:
        prefix = tokenizer(text[:edge], add_special_tokens=False, verbose=False)["input_ids"]
        differs = (i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b)
        # A longer prefix has at least the tokens of a shorter one, even where its own end disturbs them.
        positions.append(max([*positions[-1:], next(differs, min(len(prefix), len(ids)))]))
    return [
        (edge, following)
        for edge, following, position, next_position in zip(
            ordered, ordered[1:], positions, positions[1:], strict=False
        )
        for _ in range(next_position - position)
    ]
