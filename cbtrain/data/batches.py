"""Rows to batches: what one micro-step, and one held-out forward, sees.

`step_batches` is a pure function of (seed, step), so a run that resumes, or runs on another number of workers, sees
the same rows in the same order.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig, InputError, flag
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.formats.rows import Side
from cbtrain.data.tokenization import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tensors:
    """A dataclass whose tensors move together."""

    def to(self, device: torch.device | str) -> Self:
        """The same on a device; the CPU waits for what comes to it, which nothing else would make it do."""
        ahead = torch.device(device).type != "cpu"
        return self._each(lambda tensor: tensor.to(device, non_blocking=ahead))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, object] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, Tensors):
                changed[field.name] = value._each(change)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class TeacherStates(Tensors):
    """The frozen teacher's hidden states at a batch's scored positions, in the batch's order."""

    hidden: Tensor
    """[N, K, H]: K layers at the N scored tokens."""
    final: Tensor | None
    """[M, H]: after the final norm, at the M scored predictions; None where it was not asked for."""

    @property
    def head_input(self) -> Tensor:
        """`final`; a `ValueError` where it was not asked for."""
        if self.final is None:
            raise ValueError("these states were made without the final one")
        return self.final


@dataclass(frozen=True)
class TokenBatch(Tensors):
    """B rows, padded on the right to the longest (S). Padding is known by `attention_mask` alone.

    What is scored is known by its positions in the flattened batch [B · S], found once on the CPU: selecting by a
    boolean mask would make the CPU wait for the GPU each time.
    """

    rows: tuple[TokenRow, ...]
    input_ids: Tensor
    """[B, S] int64."""
    attention_mask: Tensor
    """[B, S] int64, 1 at tokens and 0 at padding."""
    scored_tokens: Tensor
    """[N] int64, where a token is scored: positions of hidden states."""
    scored_predictions: Tensor
    """[M] int64, where the *next* token is scored: positions of logits."""
    teacher: TeacherStates | None = None
    """What the teacher makes of these rows, where it is known beforehand."""


Change = Callable[[TokenBatch], TokenBatch]
PASS_TOKENS = 128
"""A pass through the model costs, however short, about as much as so many tokens more in another."""


@dataclass(frozen=True)
class PairedBatch:
    """What one micro-step sees: as many harmful rows as benign ones, rows of like length together."""

    harmful: tuple[TokenBatch, ...]
    benign: tuple[TokenBatch, ...]

    def each(self, harmful: Change, benign: Change | None = None) -> "PairedBatch":
        """The same with every batch changed, each side in its own way or both in one."""
        return PairedBatch(tuple(map(harmful, self.harmful)), tuple(map(benign or harmful, self.benign)))


@dataclass(frozen=True)
class ScoredCounts:
    """Counts over the global batch of a step, all ranks and micro-steps: the losses' denominators."""

    harmful_tokens: int
    benign_tokens: int
    benign_predictions: int
    tokens: int
    """Of both sides, scored or not."""


def pad_token_id(tokenizer: "PreTrainedTokenizerBase", vocabulary: int | None = None) -> int:
    """The id that fills a batch: pad, else the end of text, else 0. Which it is never matters: see `TokenBatch`.

    Args:
        vocabulary: ids that the model has embeddings for; None takes the tokenizer's own. A pad token that was added
            without resizing the model lies beyond them.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None and (vocabulary is None or token < vocabulary)), 0)


def collate(rows: Sequence[TokenRow], pad_token_id: int) -> TokenBatch:
    """Rows as one batch [B, S], padded on the right to the longest."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    scored = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        attention_mask[i, :length] = 1
        scored[i, :length] = torch.tensor(row.scored)
    before_scored = torch.zeros_like(scored)
    before_scored[:, :-1] = scored[:, 1:]
    tokens, predictions = (mask.flatten().nonzero().flatten() for mask in (scored, before_scored))
    return TokenBatch(tuple(rows), input_ids, attention_mask, tokens, predictions)


def collate_by_length(
    rows: Sequence[TokenRow], pad_token_id: int, pass_tokens: int = PASS_TOKENS
) -> tuple[TokenBatch, ...]:
    """Rows as the batches of least cost: their positions [B · S], padding included, and `pass_tokens` a batch."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    # best[n]: the least cost of the n shortest rows, and where the last of their batches begins.
    best = [(0, 0)]
    for end in range(1, len(ordered) + 1):
        longest = len(ordered[end - 1].input_ids)
        best.append(min((best[start][0] + (end - start) * longest + pass_tokens, start) for start in range(end)))
    parts, end = [], len(ordered)
    while end:
        start = best[end][1]
        parts.append(ordered[start:end])
        end = start
    return tuple(collate(part, pad_token_id) for part in (parts if len(parts) > 1 else [rows]))


def check_batch(config: CircuitBreakerConfig, world_size: int) -> int:
    """Rows a side in one micro-step of one worker.

    Raises:
        InputError: workers, micro-steps and rows of a micro-step do not multiply to the batch.
    """
    steps = config.gradient_accumulation
    parts = world_size * (steps or 1)
    micro = config.micro_batch_size or max(1, config.batch_size // parts)
    if config.batch_size % (parts * micro) or (steps and config.batch_size != parts * micro):
        asked = f"{world_size} workers" + (f" × {steps} micro-steps ({flag('gradient_accumulation')})" if steps else "")
        asked += f" × {micro} rows a micro-step ({flag('micro_batch_size')})"
        what = f"not {asked}, which are {parts * micro}" if steps else f"not divisible by {asked}"
        raise InputError(f"{flag('batch_size')} {config.batch_size}: {what}")
    return micro


def smaller_micro_batches(config: CircuitBreakerConfig, world_size: int) -> CircuitBreakerConfig | None:
    """The configuration of a next attempt after memory ran out: half the rows at a time, twice the micro-steps.

    The same mathematics, since every loss is divided by the counts of the whole update, whatever its parts; with
    dropout other draws. An odd micro-batch is divided by its smallest factor. None where it is a single row.

    Raises:
        InputError: as `check_batch`.
    """
    micro = check_batch(config, world_size)
    if micro == 1:
        return None
    rows = micro // next(factor for factor in range(2, micro + 1) if micro % factor == 0)
    steps = config.batch_size // (world_size * rows)
    return replace(config, micro_batch_size=rows, gradient_accumulation=steps)


def step_batches(
    data: CircuitBreakerData,
    config: CircuitBreakerConfig,
    step: int,
    pad_token_id: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[PairedBatch], ScoredCounts]:
    """The micro-steps of one rank in optimizer step `step` (from 0), and the counts of the whole global batch.

    Each side runs through its training rows in an order of its own per epoch; a side with fewer rows than the batch
    repeats. The global batch depends on (seed, step) alone; a rank takes a contiguous share of it. Under ZeRO-3 every
    rank must make as many passes as the others, so there a micro-step's rows stay in one batch.

    Raises:
        InputError: the batch does not divide into workers and micro-steps.
    """
    micro = check_batch(config, world_size)
    harmful = _global_batch(data.harmful.train, "harmful", config, step)
    benign = _global_batch(data.benign.train, "benign", config, step)
    counts = ScoredCounts(
        harmful_tokens=sum(row.scored_tokens for row in harmful),
        benign_tokens=sum(row.scored_tokens for row in benign),
        benign_predictions=sum(row.scored_predictions for row in benign),
        tokens=sum(len(row.input_ids) for row in (*harmful, *benign)),
    )
    share = config.batch_size // world_size
    starts = range(rank * share, (rank + 1) * share, micro)
    pass_tokens = sys.maxsize if config.zero_stage == 3 else PASS_TOKENS
    sides = [
        [collate_by_length(rows[i : i + micro], pad_token_id, pass_tokens) for i in starts]
        for rows in (harmful, benign)
    ]
    return [PairedBatch(*pair) for pair in zip(*sides, strict=True)], counts


def held_out_batches(rows: Sequence[TokenRow], batch_size: int, pad_token_id: int) -> list[TokenBatch]:
    """All rows in a fixed order, short ones together; the last batch may be smaller."""
    ordered = sorted(rows, key=lambda row: (len(row.input_ids), row.source, row.input_ids))
    return [collate(ordered[i : i + batch_size], pad_token_id) for i in range(0, len(ordered), batch_size)]


def _global_batch(rows: Sequence[TokenRow], side: Side, config: CircuitBreakerConfig, step: int) -> list[TokenRow]:
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    return [rows[_epoch_order(config.seed, side, i // len(rows), len(rows))[i % len(rows)]] for i in places]


@lru_cache(maxsize=16)
def _epoch_order(seed: int, side: Side, epoch: int, rows: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"{seed}/{side}/{epoch}").shuffle(order)
    return tuple(order)
