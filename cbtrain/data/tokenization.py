"""Rendered rows to tokens: ids, the mask of scored tokens, and truncation that keeps the scored side."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from cbtrain.data.chat_template import Rendering

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
            offsets = encoded["offset_mapping"][i] if tokenizer.is_fast else _offsets(rendering, ids, tokenizer)
            yield ids, _scored(rendering, offsets)


def truncate(
    ids: Sequence[int], scored: Sequence[bool], max_length: int, bos_token_id: int | None
) -> tuple[Sequence[int], Sequence[bool]]:
    """Cut a row to `max_length` tokens, keeping what is scored and at least one token to predict it from.

    The window ends at the last scored token, or, where the scored part is longer than the window, starts one token
    before the first. A row that began with `bos_token_id` still does, within the length.
    """
    if len(ids) <= max_length or not any(scored):
        return ids, scored
    first, last = scored.index(True), len(scored) - 1 - scored[::-1].index(True)
    start = max(0, min(first - 1, last + 1 - max_length))
    if start == 0 or ids[0] != bos_token_id or max_length < 3:
        return ids[start : start + max_length], scored[start : start + max_length]
    room = max_length - 1
    start = max(1, min(first - 1, last + 1 - room))
    return [ids[0], *ids[start : start + room]], [scored[0], *scored[start : start + room]]


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


def _offsets(rendering: Rendering, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """Characters of each token, as far as the scored ranges need it, for a tokenizer that does not tell.

    The tokens of a prefix of the text are the first tokens of the text, but for one that its end cuts apart.
    """
    edges = {0, len(rendering.text)}
    for start, stop in rendering.spans or ():
        edges |= {start, _end_of_words(rendering.text, start, stop), stop}
    ordered = sorted(edges)
    positions: list[int] = []
    for edge in ordered:
        prefix = tokenizer(rendering.text[:edge], add_special_tokens=False, verbose=False)["input_ids"]
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
