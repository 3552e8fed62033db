"""Where run directories are made, and whether every node of the cluster sees them.

`--storage-path` is a directory that all nodes share: run directory, journal and teacher cache need a file system with
locks and memory maps, which no object store is.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbtrain.config import InputError

JOB_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit` for what it starts."""
LOOK_S = 60.0
"""How long a node may take to look for a file."""


def run_path(storage_path: Path | None, run_dir: Path) -> Path:
    """Where a sweep's run directory is: `run_dir`, if relative below `storage_path` where that is given.

    Raises:
        InputError: `storage_path` is no directory, or `run_dir` lies outside of it.
    """
    if storage_path is None:
        return run_dir
    if not storage_path.is_dir():
        raise InputError(f"--storage-path {storage_path}: no such directory; make it, where every node sees it")
    path = storage_path / run_dir
    if not path.resolve().is_relative_to(storage_path.resolve()):
        raise InputError(f"{run_dir} lies outside of --storage-path {storage_path}; name a directory below it")
    return path


def require_shared(run_dir: Path, storage_path: Path | None) -> None:
    """Refuse a run directory that would not outlive a Ray job, or that a node which runs trials does not see.

    One node, its own or a cluster's, needs nothing. Ray is running.

    Args:
        run_dir: a directory that exists.
        storage_path: as given.

    Raises:
        InputError: why, and the mend.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    require_durable(len(nodes), storage_path, os.environ)
    workers = [node for node in nodes if node["Resources"].get("CPU")]
    if len(nodes) > 1 and (blind := _blind(run_dir, workers)):
        where = f"--storage-path {storage_path}" if storage_path else str(run_dir)
        raise InputError(f"{where}: not seen by {', '.join(blind)}: give a directory that all nodes share")


def require_durable(nodes: int, storage_path: Path | None, environment: Mapping[str, str]) -> None:
    """Refuse a job on several nodes without `--storage-path`.

    Raises:
        InputError: the reason.
    """
    if storage_path is None and nodes > 1 and JOB_ENVIRONMENT in environment:
        raise InputError(
            f"--storage-path: needed in a job on {nodes} nodes: a run directory in the job's working directory is on "
            "one node and vanishes with the job; name a directory that all nodes share"
        )


def _blind(run_dir: Path, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The addresses of nodes that do not see a new file in `run_dir`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = run_dir / f"probe.{uuid.uuid4().hex}"
    probe.touch()
    try:
        sees = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            looking = ray.remote(os.path.exists).options(num_cpus=0, scheduling_strategy=there)
            sees[looking.remote(str(probe))] = node["NodeManagerAddress"]
        looked, _ = ray.wait(list(sees), num_returns=len(sees), timeout=LOOK_S)
        found = [answer for answer in looked if ray.get(answer)]
        return sorted(address for answer, address in sees.items() if answer not in found)
    finally:
        probe.unlink(missing_ok=True)
