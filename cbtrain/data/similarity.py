"""How alike two sides are: rows that differ in case, punctuation or spaces alone, and the tokens that both score."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cbtrain.data.dataset import CircuitBreakerData, SideData
from cbtrain.data.tokenization import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOT_A_WORD = re.compile(r"[\W_]+")


def near_duplicates(data: CircuitBreakerData, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[TokenRow, TokenRow]]:
    """Harmful rows of which a benign row is the same but for case, punctuation and white space, each with that one."""
    harmful, benign = (_normalised(side.rows, tokenizer) for side in (data.harmful, data.benign))
    return [(row, benign[text]) for text, row in harmful.items() if text in benign]


def token_overlap(data: CircuitBreakerData) -> float:
    """Share of the scored tokens that the two sides have in common: 1 where they score the same text, 0 where none.

    Of each token the smaller of its two relative frequencies, summed.
    """
    harmful, benign = (_frequencies(side) for side in (data.harmful, data.benign))
    total = harmful.total(), benign.total()
    if not all(total):
        return 0.0
    return sum(min(harmful[token] / total[0], benign[token] / total[1]) for token in harmful)


def _frequencies(side: SideData) -> Counter[int]:
    counts: Counter[int] = Counter()
    for row in side.rows:
        counts.update(token for token, scored in zip(row.input_ids, row.scored, strict=True) if scored)
    return counts


def _normalised(rows: Sequence[TokenRow], tokenizer: "PreTrainedTokenizerBase") -> dict[str, TokenRow]:
    texts = tokenizer.batch_decode([row.input_ids for row in rows], skip_special_tokens=True)
    return {_NOT_A_WORD.sub(" ", text.casefold()).strip(): row for text, row in zip(texts, rows, strict=True)}
