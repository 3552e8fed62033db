"""A loss or gradient that is not finite: the error that ends the run, and the rows that gave it, saved beside the run.

`non_finite.json` holds the step, its losses and gradient norm, and of each micro-batch whose own share was not finite
(of all of them where the losses were finite and the gradient was not) rank, losses and rows, a `file:line` each.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cbtrain.data.batches import PairedBatch, TokenBatch
from cbtrain.utils import distributed
from cbtrain.utils.files import write_whole

LOSSES = ("loss", "loss_reroute", "loss_retain", "loss_kl")
"""Names of `StepOutput.parts`, in its order."""
FILE = "non_finite.json"


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient became NaN or infinite. The same step of the same run would give it again."""

    step: int = 0
    """The update that would have carried it."""


class MicroStep(NamedTuple):
    """One backward of this rank: its rows, each `file:line`, and its share of the update's losses."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    parts: Tensor
    """[4], as `StepOutput.parts`."""


def micro_step(batch: PairedBatch, parts: Tensor) -> MicroStep:
    """What is kept of a micro-step until its numbers are read."""
    return MicroStep(_sources(batch.harmful), _sources(batch.benign), parts)


def _sources(batches: Sequence[TokenBatch]) -> tuple[str, ...]:
    return tuple(row.source for rows in batches for row in rows.rows)


def saved_error(
    directory: Path, step: int, losses: Sequence[float], grad_norm: float, micro_steps: Sequence[MicroStep]
) -> NonFiniteLossError:
    """The error of an update, when its rows are in `non_finite.json`. Every rank calls it.

    Args:
        directory: the run's.
        losses: the update's, in the order of `LOSSES`.
        grad_norm: of the whole gradient.
        micro_steps: this rank's.
    """
    mine: list[dict[str, Any]] = [
        {
            "rank": distributed.rank(),
            "micro_step": number,
            "losses": _told(micro.parts.tolist()),
            "harmful": list(micro.harmful),
            "benign": list(micro.benign),
        }
        for number, micro in enumerate(micro_steps)
    ]
    batches = distributed.collected(mine)
    bad = [batch for batch in batches if not all(isinstance(value, float) for value in batch["losses"].values())]
    record = {
        "schema_version": 1,
        "step": step,
        "workers": distributed.world_size(),
        "losses": _told(losses),
        "grad_norm_total": _number(grad_norm),
        "batches": bad or batches,
    }
    path = directory / FILE
    if distributed.rank() == 0:
        write_whole(path, json.dumps(record, indent=1) + "\n")
    named = ", ".join(f"{name} {value:g}" for name, value in zip(LOSSES, losses, strict=True))
    what = "the gradient is" if all(map(math.isfinite, losses)) else "a loss is"
    error = NonFiniteLossError(f"step {step}: {what} not finite ({named}); lower --lr, or see the rows in {path}")
    error.step = step
    return error


def _told(losses: Sequence[float]) -> dict[str, Any]:
    return {name: _number(value) for name, value in zip(LOSSES, losses, strict=True)}


def _number(value: float) -> float | str:
    """A number as JSON can hold it: `nan`, `inf` and `-inf` as text."""
    return value if math.isfinite(value) else str(value)
