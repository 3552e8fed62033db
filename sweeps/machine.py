"""Where trials run: Ray for one sweep, and how many trials its cluster holds at a time."""

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray

from cbtrain.config import InputError
from sweeps.trial import Workers

ROOT = Path(__file__).resolve().parent.parent
MAX_CONCURRENT_BY_DEFAULT = 4
"""More trials at a time than this leave a search of some ten points little to learn from."""
DRIVER_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not only the trial
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a trial's clean-up may take longer than Ray's 2 s
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def started_ray() -> Iterator[Mapping[str, float]]:
    """Ray for the body: the cluster of `RAY_ADDRESS`, or one of this machine that ends with the body.

    Yields:
        The cluster's resources.
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
                # One malloc arena keeps a kept process's memory flat over many trials.
                runtime_env={"env_vars": {"PYTHONPATH": python_path, "MALLOC_ARENA_MAX": "1"}},
                **own,
            )
    except (ConnectionError, RuntimeError, OSError) as error:
        where = f"RAY_ADDRESS {address}" if address else "starting Ray on this machine"
        raise InputError(f"{where}: {str(error).strip().splitlines()[0]}") from error
    # Ray's own handler writes on the screen; the root's, where there is one, is enough.
    logging.getLogger("ray").handlers = [logging.NullHandler()]
    logging.getLogger("ray").propagate = True
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _require_listening(address: str) -> None:
    """Refuse an address where nothing answers, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS {address}: no Ray cluster answers; unset it to use this machine") from error


def place(
    resources: Mapping[str, float], *, workers: int, gpus_per_worker: float | None, max_concurrent: int | None
) -> tuple[Workers, int]:
    """What one trial runs on, and how many trials run at a time.

    Args:
        resources: the cluster's, in Ray's names.
        workers: worker processes a trial.
        gpus_per_worker: None is 1 where the cluster has GPUs, else 0.
        max_concurrent: trials at a time at most; None is `MAX_CONCURRENT_BY_DEFAULT`.

    Raises:
        InputError: not even one trial fits, with the arithmetic.
    """
    if gpus_per_worker is not None and not 0 <= gpus_per_worker < math.inf:
        raise InputError(f"--gpus-per-worker {gpus_per_worker}: must be 0 or more")
    cpus, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0)
    gpus_per_worker = gpus_per_worker if gpus_per_worker is not None else float(gpus > 0)
    if workers > cpus:
        raise InputError(f"--workers-per-trial {workers}: the cluster has {cpus} CPUs, and a worker takes one at least")
    if workers * gpus_per_worker > gpus:
        need = f"{workers} workers × {gpus_per_worker:g} GPUs = {workers * gpus_per_worker:g}"
        raise InputError(f"--gpus-per-worker {gpus_per_worker:g}: {need}, the cluster has {gpus:g}")
    room = cpus // workers
    if gpus_per_worker:
        room = min(room, int(gpus / (workers * gpus_per_worker)))
    concurrency = min(room, max_concurrent or MAX_CONCURRENT_BY_DEFAULT)
    return Workers(workers, cpus // (concurrency * workers), gpus_per_worker), concurrency
