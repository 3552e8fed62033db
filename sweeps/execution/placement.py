"""Where trials run: Ray for one sweep, and how many trials its cluster holds at a time.

Capacity is counted node by node, since a worker needs its CPUs and its share of a GPU on one of them.
"""

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray._private.state as ray_state
from ray.train import ScalingConfig

from cbtrain.config import InputError
from cbtrain.utils.errors import first_line

ROOT = Path(__file__).resolve().parents[2]
MAX_CONCURRENT_BY_DEFAULT = 4
"""More trials at a time than this leave a search of some ten points little to learn from."""
SETTLE_S = 10.0
"""What ended on a cluster a moment ago may still count as taken for so long."""
DRIVER_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not only the trial
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a trial's clean-up may take longer than Ray's 2 s
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # keeps a kept process's memory flat over many trials
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a trial's end is seen; by default 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more a trial, for a notice that no trial heeds
}


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


@contextlib.contextmanager
def started_ray() -> Iterator[list[Node]]:
    """Ray for the body: the cluster of `RAY_ADDRESS`, or one of this machine that ends with the body.

    Yields:
        The cluster's nodes.
    """
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"include_dashboard": False, "object_store_memory": 256 * 2**20}
    if address and ":" in address and "://" not in address:
        _require_listening(address)
    try:
        # Workers import from the directory in which Ray is started before they look into PYTHONPATH.
        with contextlib.chdir(ROOT):
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": python_path, **WORKER_ENVIRONMENT}},
                **own,
            )
    except (ConnectionError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        where = f"RAY_ADDRESS {address}" if address else "starting Ray on this machine"
        raise InputError(f"{where}: {first_line(error)}") from error
    # Ray's own handler writes on the screen; the root's, where there is one, is enough.
    logging.getLogger("ray").handlers = [logging.NullHandler()]
    logging.getLogger("ray").propagate = True
    try:
        yield _nodes()
    finally:
        ray.shutdown()


def _require_listening(address: str) -> None:
    """Refuse an address where nothing answers, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS {address}: no Ray cluster answers; unset it to use this machine") from error


def _nodes() -> list[Node]:
    """The nodes that are alive, when nothing is taken any more, or what is still taken after `SETTLE_S`."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        free = ray_state.available_resources_per_node()
        nodes = []
        for name, total in ray_state.total_resources_per_node().items():
            cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
            left = free.get(name, {})
            nodes.append(Node(cpus, gpus, cpus - left.get("CPU", 0.0), gpus - left.get("GPU", 0.0)))
        if not any(node.taken_cpus or node.taken_gpus for node in nodes) or time.monotonic() > deadline:
            return nodes
        time.sleep(0.5)


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
