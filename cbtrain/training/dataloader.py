"""The batches of a training run, one step after the other, on the device and with what the teacher cache knows.

On a GPU the next step's rows are collated, looked up in the cache and pinned by a thread while this step runs.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import PairedBatch, ScoredCounts, TokenBatch, step_batches
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.model.checks import retained_layers
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.utils import distributed


@dataclass(frozen=True)
class StepInput:
    """What this rank needs for one update."""

    micro_batches: list[PairedBatch]
    counts: ScoredCounts


class StepLoader:
    """Every step's input.

    Args:
        layers: number of decoder blocks.
        ahead: whether a thread makes the next step's input beforehand.
    """

    def __init__(
        self,
        data: CircuitBreakerData,
        config: CircuitBreakerConfig,
        pad_token_id: int,
        layers: int,
        cache: TeacherCache | None = None,
        ahead: bool | None = None,
    ) -> None:
        self._data, self._config, self._pad, self._cache = data, config, pad_token_id, cache
        self._retained = retained_layers(config, layers)
        self._ahead = torch.cuda.is_available() if ahead is None else ahead

    def steps(self, first: int) -> Iterator[StepInput]:
        """Inputs of the steps from `first` (counted from 0) to the last."""
        steps = range(first, self._config.steps)
        if not self._ahead:
            yield from map(self._on_device, map(self._make, steps))
            return
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self._make, first)
            for step in steps:
                made = coming.result()
                if step + 1 < self._config.steps:
                    coming = thread.submit(self._make, step + 1)
                yield self._on_device(made)

    def _make(self, step: int) -> StepInput:
        pairs, counts = step_batches(
            self._data, self._config, step, self._pad, distributed.rank(), distributed.world_size()
        )
        if self._cache is not None:
            cache, targets, retained = self._cache, self._config.target_layers, self._retained
            pairs = [
                pair.each(
                    lambda rows: cache.attach(rows, targets, False), lambda rows: cache.attach(rows, retained, True)
                )
                for pair in pairs
            ]
        if torch.cuda.is_available():
            pairs = [pair.each(TokenBatch.pin_memory) for pair in pairs]
        return StepInput(pairs, counts)

    def _on_device(self, made: StepInput) -> StepInput:
        device = distributed.device()
        return StepInput([pair.each(lambda rows: rows.to(device)) for pair in made.micro_batches], made.counts)
