"""What a trial runs on, and how many trials a cluster holds at a time.

Capacity is counted node by node, since a worker needs its CPUs and its share of a GPU on one of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ray.train import ScalingConfig

from cbtrain.config import InputError

MAX_CONCURRENT_BY_DEFAULT = 4
"""More trials at a time than this leave a search of some ten points little to learn from."""


TUNE_RESOURCES = {"memory": 1}
"""What Tune reserves for a trial's own process, which works little; what trains reserves CPUs and GPUs beside it."""


@dataclass(frozen=True)
class Workers:
    """What one trial runs on."""

    count: int = 1
    """Worker processes a trial."""
    cpus: int = 1
    """CPUs a worker, which is also its number of threads."""
    gpus: float = 0
    """GPUs a worker."""

    @property
    def in_process(self) -> bool:
        """Whether the trial runs in a process that is kept, and not on workers that are started for it."""
        return self.count == 1 and self.gpus == 0

    def scaling(self) -> ScalingConfig:
        """What Train starts."""
        if self.in_process:
            return ScalingConfig(num_workers=0)
        resources = {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}
        # PACK: on as few nodes as hold them, all at once or not yet.
        return ScalingConfig(
            num_workers=self.count,
            use_gpu=self.gpus > 0,
            resources_per_worker=resources,
            placement_strategy="PACK",
        )


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has, and what of it others have taken."""

    cpus: float
    gpus: float = 0
    taken_cpus: float = 0
    taken_gpus: float = 0

    def free(self) -> "Node":
        """The node without what others have taken."""
        return Node(self.cpus - self.taken_cpus, self.gpus - self.taken_gpus)

    def holds(self, cpus: int, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs find room here; a share of a GPU lies on one GPU."""
        room = int(self.cpus // cpus)
        if gpus == 0:
            return room
        # A tenth of a GPU fits ten times, whatever its binary fraction.
        shares = int(1 / gpus + 1e-6) * int(self.gpus) if gpus < 1 else int(self.gpus // gpus)
        return min(room, shares)


def place(
    nodes: Sequence[Node], *, workers: int, gpus_per_worker: float | None, max_concurrent: int | None
) -> tuple[Workers, int]:
    """What one trial runs on, and how many trials run at a time; no more than find room together, so that none waits
    for what another holds.

    Args:
        nodes: the cluster's. A trial's workers may lie on several of them, each worker on one.
        workers: worker processes a trial.
        gpus_per_worker: None is 1 where the cluster has GPUs, else 0.
        max_concurrent: trials at a time at most; None is `MAX_CONCURRENT_BY_DEFAULT`.

    Raises:
        InputError: not even one trial finds room, with the arithmetic.
    """
    gpus = float(any(node.gpus for node in nodes)) if gpus_per_worker is None else gpus_per_worker
    free = [node.free() for node in nodes]

    def room(cpus: int) -> int:
        return sum(node.holds(cpus, gpus) for node in free)

    if room(1) < workers:
        raise InputError(_no_room(nodes, workers, gpus))
    concurrency = min(room(1) // workers, max_concurrent or MAX_CONCURRENT_BY_DEFAULT)
    most = int(max(node.cpus for node in free))
    cpus = next(cpus for cpus in range(most, 0, -1) if room(cpus) >= concurrency * workers)
    return Workers(workers, cpus, gpus), concurrency


def placement_line(nodes: Sequence[Node], workers: Workers, concurrency: int) -> str:
    """Why so many trials run at a time, in one line."""
    each = _amount(workers.cpus, workers.gpus)
    takes = f"{workers.count} workers of {each}" if workers.count > 1 else each
    return f"{concurrency} at a time, a trial on {takes} · room for {_room(nodes, workers.cpus, workers.gpus)}"


def _no_room(nodes: Sequence[Node], workers: int, gpus: float) -> str:
    """What a trial needs, and what each node has for it."""
    asked = f"--workers-per-trial {workers}" + (f" --gpus-per-worker {gpus:g}" if gpus else "")
    taken = "" if all(node == node.free() for node in nodes) else ", what others have taken left out"
    return f"{asked}: a worker needs {_amount(1, gpus)}, and there is room for {_room(nodes, 1, gpus)}{taken}"


def _room(nodes: Sequence[Node], cpus: int, gpus: float) -> str:
    """How many workers find room, and on what nodes: `3 (2 on 4 CPUs, 1 on 2 CPUs)`, like nodes together."""
    free = Counter(node.free() for node in nodes)
    parts = [
        f"{count} × {node.holds(cpus, gpus)} on {_amount(node.cpus, node.gpus)}"
        if count > 1
        else f"{node.holds(cpus, gpus)} on {_amount(node.cpus, node.gpus)}"
        for node, count in free.items()
    ]
    return f"{sum(node.holds(cpus, gpus) for node in free.elements())} ({', '.join(parts)})"


def _amount(cpus: float, gpus: float) -> str:
    text = f"{cpus:g} CPU{'s' * (cpus != 1)}"
    return f"{text} + {gpus:g} GPU{'s' * (gpus > 1)}" if gpus else text
