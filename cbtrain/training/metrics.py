"""What a run reports: the numbers of each update, their file, and the seconds spent on what."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import ScoredCounts
from cbtrain.losses.schedule import Coefficients
from cbtrain.training.non_finite import FILE, LOSSES, MicroStep, saved_error
from cbtrain.utils import distributed
from cbtrain.utils.files import write_whole
from cbtrain.utils.metrics_file import read_metrics

Metrics = dict[str, float]
Report = Callable[[Metrics], None]


class Update(NamedTuple):
    """One optimizer update, its numbers where they were computed."""

    step: int
    parts: Tensor
    """[4], summed over micro-steps and ranks."""
    grad_norm: Tensor | float
    counts: ScoredCounts
    weights: Coefficients
    lr: float
    micro_steps: Sequence[MicroStep]
    """This rank's."""

    @property
    def numbers(self) -> Tensor:
        """[5]: parts and gradient norm."""
        return torch.cat([self.parts, torch.as_tensor(self.grad_norm).to(self.parts).reshape(1)])


class Updates:
    """Updates since the last reading. Reading waits for the device, so it is done for many at a time."""

    def __init__(self, config: CircuitBreakerConfig, clock: "Clock", output_dir: Path) -> None:
        self._config = config
        self._clock = clock
        self._output_dir = output_dir
        self._since: list[Update] = []
        self._train_s = clock.seconds["train"]

    def add(self, update: Update) -> None:
        """Keep an update for the next reading."""
        self._since.append(update)

    def read(self) -> Metrics:
        """The metrics of the last update; the clock's lap of training ends here.

        Raises:
            NonFiniteLossError: on every rank, with the first update since the last reading whose losses or gradient
                were not finite; its rows are saved.
        """
        table = torch.stack([update.numbers for update in self._since]).tolist()
        for update, (*parts, norm) in zip(self._since, table, strict=True):
            if not all(map(math.isfinite, (*parts, norm))) or norm < 0:  # below 0 DeepSpeed says that it is not finite
                raise saved_error(self._output_dir, update.step, parts, norm, update.micro_steps)
        self._clock.lap("train")
        train_s = self._clock.seconds["train"]
        seconds, self._train_s = train_s - self._train_s, train_s
        tokens, last = sum(update.counts.tokens for update in self._since), self._since[-1]
        self._since = []
        return {
            "step": last.step,
            **dict(zip(LOSSES, table[-1][:-1], strict=True)),
            "cs": last.weights.cs,
            "cr": last.weights.cr,
            "alpha": self._config.alpha,
            "beta_kl": self._config.beta_kl,
            "kl_temperature": self._config.kl_temperature,
            "kl_weight": last.weights.kl_weight,
            "grad_norm_total": table[-1][-1],
            "lr": last.lr,
            "scored_tokens_harmful": last.counts.harmful_tokens,
            "scored_tokens_benign": last.counts.benign_tokens,
            "tokens_per_s": tokens / seconds,
            "train_s": train_s,
        }


class Clock:
    """Seconds spent in each kind of work; a resumed run goes on from those that its checkpoint had taken."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = {"train": 0.0, "eval": 0.0, "other": 0.0} | dict(seconds or {})
        self._since = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Count the time since the last lap as work of this kind."""
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now


class MetricsLog:
    """`metrics.jsonl`, a line a logged step, written by rank 0; a resumed run drops the lines it will write again."""

    def __init__(self, output_dir: Path, config: CircuitBreakerConfig, first_step: int) -> None:
        path = output_dir / "metrics.jsonl"
        earlier = read_metrics(path, skip_damaged=True) if first_step else []
        self.kept = [metrics for metrics in earlier if metrics["step"] <= first_step]
        """What a resumed run had logged before the step that it goes on from."""
        self._path = path if distributed.rank() == 0 else None
        if self._path is None:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / FILE).unlink(missing_ok=True)  # of an earlier attempt
        write_whole(output_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        write_whole(self._path, "".join(json.dumps(metrics) + "\n" for metrics in self.kept))

    def write(self, metrics: Metrics) -> None:
        """Append a line."""
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")


def console_line(metrics: Metrics) -> str:
    """The line of a training run: unweighted losses, and α, the current reroute coefficient."""
    line = (
        f"Step {metrics['step']}: loss={metrics['loss']:.4f}, reroute={metrics['loss_reroute']:.4f}, "
        f"retain={metrics['loss_retain']:.4f}, kl={metrics['loss_kl']:.4f}, α={metrics['cs']:.4f}"
    )
    if "eval_loss_reroute" in metrics:
        line += (
            f"\n  held out: reroute={metrics['eval_loss_reroute']:.4f}, benign KL={metrics['eval_benign_kl']:.4f} "
            f"nats/token, harmful NLL={metrics['eval_harmful_nll']:.2f} (base {metrics['base_harmful_nll']:.2f})"
        )
    return line
