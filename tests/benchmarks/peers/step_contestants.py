"""What `bench_step` measures: one step by the public pattern, with a live teacher and with a cached one."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cbtrain.data.batches import PairedBatch, ScoredCounts, collate
from cbtrain.losses.schedule import Coefficients
from cbtrain.model.attention import use_attention_in_float32
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.teacher_cache.wanted_states import WantedStates
from cbtrain.training.step import CircuitBreakerStep

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # which pytest puts there itself
from plain_step import plain_step

PLAIN = "public pattern"
LIVE_ALIKE, CACHED_ALIKE = "live, padded alike", "cached, padded alike"
LIVE, CACHED = "live", "cached"
WEIGHTS = Coefficients(cs=5.0, cr=5.0, kl_weight=1.5)

Contestant = Callable[[PairedBatch], tuple[Tensor, Tensor]]
"""A batch on the CPU, rows of like length together, to the loss and [loss, reroute, retain, kl]."""


def fill(cache: TeacherCache, step: CircuitBreakerStep, batches: Sequence[PairedBatch], device: str, pad: int) -> None:
    """The states of every row of the batches."""
    target, retained = tuple(step.config.target_layers), tuple(step.retained)
    wanted = []
    for batch in batches:
        wanted += [WantedStates(row, target, False) for part in batch.harmful for row in part.rows]
        wanted += [WantedStates(row, retained, True) for part in batch.benign for row in part.rows]
    teacher = step.decoder.teacher
    cache.build(
        wanted,
        lambda batch, layers, final: teacher(batch.to(device), layers, final),
        batch_size=8,
        pad_token_id=pad,
    )


def contestants(step: CircuitBreakerStep, cache: TeacherCache, device: str, pad: int) -> dict[str, Contestant]:
    """The public pattern first. "Padded alike" has a side's rows in one pass, as the public pattern has them."""
    config = step.config

    def moved(batch: PairedBatch) -> PairedBatch:
        return batch.each(lambda rows: rows.to(device))

    def alike(batch: PairedBatch) -> PairedBatch:
        sides = (batch.harmful, batch.benign)
        return PairedBatch(*((collate([row for part in side for row in part.rows], pad),) for side in sides))

    def plain(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        AttentionInterface.register("sdpa", sdpa_attention_forward)  # the library's, as the pattern's users have it
        return plain_step(step.model, moved(batch), config, WEIGHTS)

    def live(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        counts = ScoredCounts(
            harmful_tokens=sum(len(rows.scored_tokens) for rows in batch.harmful),
            benign_tokens=sum(len(rows.scored_tokens) for rows in batch.benign),
            benign_predictions=sum(len(rows.scored_predictions) for rows in batch.benign),
            tokens=0,
        )
        use_attention_in_float32()
        return step(moved(batch), counts, WEIGHTS)

    def cached(batch: PairedBatch) -> tuple[Tensor, Tensor]:
        return live(
            batch.each(
                lambda rows: cache.attach(rows, config.target_layers, False),
                lambda rows: cache.attach(rows, step.retained, True),
            )
        )

    return {
        PLAIN: plain,
        LIVE_ALIKE: lambda batch: live(alike(batch)),
        CACHED_ALIKE: lambda batch: cached(alike(batch)),
        LIVE: live,
        CACHED: cached,
    }
