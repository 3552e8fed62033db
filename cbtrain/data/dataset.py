"""Tokenised data: both sides with their held-out split, and the counts of what became of the files."""

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cbtrain.config import MaskPolicy
from cbtrain.data.tokenization import TokenRow


@dataclass(frozen=True)
class SideCounts:
    """What became of a side's files."""

    files: int
    rows: int
    """Rows of this side in its files, the dropped ones included."""
    left_out: int
    """Labelled rows of neither side."""
    other_side: int
    """Labelled rows of the other side in this side's files."""
    truncated: int
    dropped_unscored: int
    scored_tokens: int
    """In training and held-out rows together."""
    tokens: int = 0
    """The same, scored or not."""
    cut_short: int = 0
    """Truncated rows that lost scored tokens."""
    prompts_cut: int = 0
    """Rows that lost tokens before the first scored one."""
    prompt_tokens_cut: int = 0
    prompts_mostly_cut: int = 0
    """Rows that lost more than half of these tokens."""
    completions_cut: int = 0
    """Rows that lost tokens from the first scored one to the last."""
    completion_tokens_cut: int = 0
    tool_result_tokens_cut: int = 0
    """Of prompts and completions."""
    first_dropped: str = ""
    """Where the first row without a scored token stands."""
    unknown: int = 0
    """Scored tokens that stand for text which the tokenizer does not know."""
    duplicates: int = 0
    """Rows of the same tokens and mask as an earlier one of the side; they are kept."""
    left_out_because: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each file the fields of its rows that nothing reads."""
    agent_rows: int = 0
    """Rows with several assistant turns that call tools."""
    calls: int = 0
    """Tool calls of the assistant turns."""
    calls_scored: int = 0
    """Of these, those in turns that the mask policy scores."""
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Characters scored and not scored by part of a conversation (`templates/parts.py`), before truncation; of at most
    100 rows."""
    rewritten: Mapping[str, int] = field(default_factory=dict)
    """Rows that the chat template could not render as they are, by what was changed."""
    shapes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For each file how many rows of which shape it holds."""


@dataclass(frozen=True)
class SideData:
    train: list[TokenRow]
    held_out: list[TokenRow]
    counts: SideCounts
    remarks: tuple[str, ...] = ()
    """What a user should know of this side's files."""

    @property
    def rows(self) -> list[TokenRow]:
        """Training and held-out rows."""
        return [*self.train, *self.held_out]


@dataclass(frozen=True)
class CircuitBreakerData:
    harmful: SideData
    benign: SideData
    mask_policy: MaskPolicy = "auto"

    @property
    def row_counts(self) -> dict[str, dict[str, int]]:
        """By side, the rows that are trained on and those held out."""
        sides = {"harmful": self.harmful, "benign": self.benign}
        return {name: {"train": len(side.train), "held_out": len(side.held_out)} for name, side in sides.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens, of which of them are scored, and of the split: what a run trains and measures on."""
        digest = hashlib.sha256()
        for rows in (self.harmful.train, self.harmful.held_out, self.benign.train, self.benign.held_out):
            digest.update(len(rows).to_bytes(8, "little"))
            for row in rows:
                digest.update(array("q", (len(row.input_ids), *row.input_ids)).tobytes())
                digest.update(bytes(row.scored))
        return digest.hexdigest()
