"""Files to batches: both sides as tokens, the held-out split, and the paired batch of every step.

`load_data` is done once per process; `step_batches` is a pure function of (seed, step), so a run that resumes, or
runs on another number of workers, sees the same rows in the same order.
"""

import hashlib
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig, InputError, flag
from cbtrain.render import ChatTemplate
from cbtrain.rows import SIDES, Side, SideRows, load_rows
from cbtrain.tokens import TokenRow, tokenize, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SideCounts:
    """What became of a side's files."""

    files: int
    rows: int
    """Rows of this side in its files, the dropped ones included."""
    left_out: int
    """Labelled rows of neither side (attack resisted)."""
    other_side: int
    """Labelled rows of the other side in this side's files."""
    truncated: int
    dropped_unscored: int
    scored_tokens: int
    """In training and held-out rows together."""


@dataclass(frozen=True)
class SideData:
    train: list[TokenRow]
    held_out: list[TokenRow]
    counts: SideCounts


@dataclass(frozen=True)
class CircuitBreakerData:
    harmful: SideData
    benign: SideData

    def describe(self) -> list[str]:
        """Lines for the screen: the split, the scored tokens, and whatever was cut, left out or dropped."""
        pair = (self.harmful, self.benign)
        split = [f"{len(side.train):,} train / {len(side.held_out):,} held out" for side in pair]
        numbers = [
            ("scored tokens", [side.counts.scored_tokens for side in pair]),
            ("truncated rows", [side.counts.truncated for side in pair]),
        ]
        losses = [
            ("left out, attack resisted", [side.counts.left_out for side in pair]),
            ("dropped, no scored token", [side.counts.dropped_unscored for side in pair]),
        ]
        lines = [f"harmful {split[0]} · benign {split[1]}"]
        for group in (numbers, losses):
            lines.append(" · ".join(f"{what} {a:,} / {b:,}" for what, (a, b) in group if a or b))
        return [line for line in lines if line]


@dataclass(frozen=True)
class TokenBatch:
    """B rows, padded on the right to the longest (S). Padding is known by `attention_mask` alone."""

    input_ids: Tensor
    """[B, S] int64."""
    attention_mask: Tensor
    """[B, S] int64, 1 at tokens and 0 at padding."""
    loss_mask: Tensor
    """[B, S] bool, True at scored tokens: positions of hidden states."""

    @property
    def prediction_mask(self) -> Tensor:
        """[B, S] bool, True at i where token i + 1 is scored: positions of logits. The last column is False."""
        mask = torch.zeros_like(self.loss_mask)
        mask[:, :-1] = self.loss_mask[:, 1:] & self.attention_mask[:, 1:].bool()
        return mask

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), self.loss_mask.to(device))


@dataclass(frozen=True)
class PairedBatch:
    """What one micro-step sees: as many harmful rows as benign ones."""

    harmful: TokenBatch
    benign: TokenBatch


@dataclass(frozen=True)
class ScoredCounts:
    """Counts over the global batch of a step, all ranks and micro-steps: the losses' denominators."""

    harmful_tokens: int
    benign_tokens: int
    benign_predictions: int


def load_data(config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase") -> CircuitBreakerData:
    """Read, tokenise, truncate and split both sides as `config` says.

    Raises:
        InputError: bad files or rows (see `cbtrain.rows`), a tokenizer whose chat template is missing or refuses a
            row, a side without a scored token, a side with a single user prompt.
    """
    side_rows = load_rows(config.harmful, config.benign)
    template = ChatTemplate(tokenizer)
    tokens = {side: _token_rows(rows, side, config, template, tokenizer) for side, rows in side_rows.items()}
    held_out = _held_out_prompts({side: rows for side, (rows, _) in tokens.items()}, config.eval_fraction)
    sides = {}
    for side, (rows, truncated) in tokens.items():
        read = side_rows[side]
        counts = SideCounts(
            files=len(read.files),
            rows=len(read.rows),
            left_out=read.left_out,
            other_side=read.other_side,
            truncated=truncated,
            dropped_unscored=len(read.rows) - len(rows),
            scored_tokens=sum(row.scored_tokens for row in rows),
        )
        sides[side] = SideData(
            train=[row for row in rows if row.prompt not in held_out],
            held_out=[row for row in rows if row.prompt in held_out],
            counts=counts,
        )
    return CircuitBreakerData(harmful=sides["harmful"], benign=sides["benign"])


def normalized_prompt(prompt: str) -> str:
    """The prompt as the split compares it: Unicode form, case and white space do not make it another one."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills a batch: pad, else the end of text, else 0. Which it is never matters: see `TokenBatch`."""
    known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
    return known[0] if known else 0


def collate(rows: Sequence[TokenRow], pad_token_id: int) -> TokenBatch:
    """Rows as one batch [B, S], padded on the right to the longest."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        attention_mask[i, :length] = 1
        loss_mask[i, :length] = torch.tensor(row.scored)
    return TokenBatch(input_ids, attention_mask, loss_mask)


def check_batch(config: CircuitBreakerConfig, world_size: int) -> int:
    """Rows a side in one micro-step of one worker; an `InputError` where the batch does not divide into them."""
    micro = config.micro_batch_size or max(1, config.batch_size // world_size)
    if config.batch_size % (world_size * micro):
        raise InputError(
            f"{flag('batch_size')} {config.batch_size}: not divisible by {world_size} workers × "
            f"{micro} rows a micro-step ({flag('micro_batch_size')})"
        )
    return micro


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
    repeats. The global batch depends on (seed, step) alone; a rank takes a contiguous share of it.

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
    )
    share = config.batch_size // world_size
    starts = range(rank * share, (rank + 1) * share, micro)
    pairs = [
        PairedBatch(collate(harmful[i : i + micro], pad_token_id), collate(benign[i : i + micro], pad_token_id))
        for i in starts
    ]
    return pairs, counts


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


def _token_rows(
    side_rows: SideRows,
    side: Side,
    config: CircuitBreakerConfig,
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[TokenRow], int]:
    """The rows of a side that have a scored prediction, and how many of them were truncated."""
    rendered = [(row, template.render(row, config.mask_policy)) for row in side_rows.rows]
    kept = [(row, rendering) for row, rendering in rendered if rendering is not None]
    token_rows: list[TokenRow] = []
    truncated = 0
    tokens = tokenize([rendering for _, rendering in kept], tokenizer)
    for (row, _), (all_ids, all_scored) in zip(kept, tokens, strict=True):
        ids, scored = truncate(all_ids, all_scored, config.max_length, tokenizer.bos_token_id)
        if any(scored[1:]):
            truncated += len(ids) < len(all_ids)
            token_rows.append(TokenRow(tuple(ids), tuple(scored), normalized_prompt(row.prompt), row.source))
    if not token_rows:
        raise _nothing_scored(side_rows, side, config)
    return token_rows, truncated


def _nothing_scored(side_rows: SideRows, side: Side, config: CircuitBreakerConfig) -> InputError:
    last_roles = sorted({row.messages[-1]["role"] for row in side_rows.rows})
    spoken = any(message["role"] == "assistant" for row in side_rows.rows for message in row.messages)
    why = "the assistant turns are empty or answer no user" if spoken else f"the rows end on a {last_roles[0]} turn"
    return InputError(
        f"{flag(side)} {' '.join(side_rows.files)}: 0 of {len(side_rows.rows):,} rows have a scored token under "
        f"{config.mask_policy}; {why}. Try --mask-policy full_sequence"
    )


def _held_out_prompts(sides: dict[Side, list[TokenRow]], eval_fraction: float) -> set[str]:
    """Prompts held out on every side: those whose hash, in [0, 1), lies below `eval_fraction`.

    Where that leaves a side without training or held-out rows, its prompt nearest to the threshold changes place on
    both sides, unless the other side would thereby lose its last one.
    """
    prompts = {side: {row.prompt for row in rows} for side, rows in sides.items()}
    for side in SIDES:
        if len(prompts[side]) < 2:
            raise InputError(
                f"{flag(side)}: all {len(sides[side]):,} scored rows have the same user prompt; training and held-out "
                "rows need a prompt each, so give at least two"
            )
    distance = {prompt: _unit_hash(prompt) - eval_fraction for side in SIDES for prompt in prompts[side]}
    held_out = {prompt for prompt in distance if distance[prompt] < 0}
    for side in SIDES:
        own = prompts[side]
        if own & held_out and own - held_out:
            continue
        parts = [part for s in SIDES for part in (prompts[s] & held_out, prompts[s] - held_out)]
        lone = {prompt for part in parts if len(part) == 1 for prompt in part}
        held_out ^= {min(own - lone, key=lambda prompt: (abs(distance[prompt]), prompt))}
    return held_out


def _unit_hash(text: str) -> float:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
