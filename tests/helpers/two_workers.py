"""What two workers run in `test_workers.py`; torchrun starts this as a script: `two_workers.py JOBS.json`."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.tokenization import TokenRow
from cbtrain.training import loop
from cbtrain.training.dataloader import StepLoader
from cbtrain.training.engine import adapted_model, deepspeed_engine
from cbtrain.training.metrics import Metrics, Report
from cbtrain.training.non_finite import NonFiniteLossError
from cbtrain.utils import distributed
from cbtrain.utils.environment import quiet_libraries
from cbtrain.utils.stopping import Interrupted, never

STEPS = 2


def half_unscored() -> CircuitBreakerData:
    """Two rows a side, of which one has no scored token."""
    sides = []
    for first in (5, 40):
        rows = [
            TokenRow(tuple(range(first, first + 9)), (False,) * 4 + (scored,) * 5, f"{first} {scored}", "rows:1")
            for scored in (True, False)
        ]
        sides.append(SideData(rows, [], SideCounts(1, 2, *[0] * 5)))
    return CircuitBreakerData(*sides)


def updates_of_half_unscored_rows(config: CircuitBreakerConfig) -> list[list[float]]:
    """Losses and gradient norm of each step; of two workers one has no scored token, on either side in turn."""
    config = replace(config, batch_size=2, steps=STEPS, lora_init_std=0.1)
    data, updates = half_unscored(), []
    with distributed.process_group(), adapted_model(config) as model, deepspeed_engine(model, config) as engine:
        feed = StepLoader(data, config, 0, engine.module.decoder.layers)
        for step, given in enumerate(feed.steps(0), 1):
            mine = sum(
                len(rows.scored_tokens) for pair in given.micro_batches for rows in (*pair.harmful, *pair.benign)
            )
            assert distributed.world_size() == 1 or mine in (0, 5, 10), mine
            update = loop.train_step(engine, given, step)
            updates.append([*update.parts.tolist(), float(update.grad_norm)])
    return updates


class StopError(Exception):
    """A run ends on every worker."""


def stop_at(step: int | None) -> Report:
    """A report that ends the run at a step, if at any."""

    def report(metrics: Metrics) -> None:
        if metrics["step"] == step:
            raise StopError

    return report


def main() -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config, output = CircuitBreakerConfig(**job["config"]), Path(job["output"])
        if job["unscored"]:
            updates = updates_of_half_unscored_rows(config)
            if distributed.rank() == 0:
                output.write_text(json.dumps(updates))
            continue
        cache = job["cache"] and Path(job["cache"])
        report, stop = stop_at(job["stop_at"]), (lambda: distributed.rank() == 1) if job["asked"] else never
        with contextlib.suppress(StopError, NonFiniteLossError, Interrupted):
            loop.train(config, output, report, resume=job["resume"], teacher_cache=cache, stop=stop)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
