"""Ray for one sweep: the cluster that `RAY_ADDRESS` names, or one of this machine that nobody else can reach.

Ray of one's own listens on the loopback interface, with a token that only this sweep's processes have, on the CPUs
that this process may use, and with its sockets where their paths are short enough.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.state as ray_state
from ray._private import ray_constants, services
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.utils import read_ray_address
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

from cbtrain.config import InputError
from cbtrain.utils.hardware import usable_cpus
from sweeps.runtime.failures import afterwards
from sweeps.runtime.placement import Node

ROOT = Path(__file__).resolve().parents[2]
SETTLE_S = 10.0
"""What ended on a cluster a moment ago may still count as taken for so long."""
OBJECT_STORE_BYTES = 256 * 2**20
LONGEST_SOCKET = 107
"""Bytes of a socket's path that Linux takes."""
SOCKET_BELOW = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12")
"""Bytes that Ray adds to the path of its directory."""
SHORT = "/tmp/ray"
"""Where Ray keeps its files by default."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HTTP2_SETTINGS = b"\x04"
"""The kind of the frame with which a server answers it."""
STARTS = 4
MARK = "KL_ABLATION_RAY"
"""Environment variable of the processes that one sweep's own Ray has started."""
KILL_MARKED = """for _ in 1 2 3 4 5 6 7 8 9; do
    left=$(grep -lsaF -- "$1" /proc/[0-9]*/environ | cut -d/ -f3)
    test "$left" || break
    kill -9 $left 2>/dev/null
    sleep 0.1
done"""
"""Again, since one may have started another meanwhile; where there is no /proc it kills nothing."""
SAID = 240
"""Characters of an error of Ray's that are shown."""
DRIVER_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not only the trial
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a trial's clean-up may take longer than Ray's 2 s
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # keeps a kept process's memory flat over many trials
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for each other take four times as long on a busy machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a trial's end is seen; by default 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more a trial, for a notice that no trial heeds
}


@contextlib.contextmanager
def started_ray() -> Iterator[list[Node]]:
    """Ray for the body: the cluster of `RAY_ADDRESS`, or one of this machine that ends with the body.

    Yields:
        The cluster's nodes.

    Raises:
        InputError: there is no such cluster, or it cannot be joined, or Ray cannot be started.
    """
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = cluster_address(os.environ)
    # Ray would upload the whole working directory for a driver below `uv run`; workers have this environment anyhow.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    # Tune would hand these on as arguments of processes, which everybody on the machine can read; no trial needs them.
    ENV_VARS_TO_PROPAGATE.difference_update({name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")})
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    workers = {"PYTHONPATH": python_path, **WORKER_ENVIRONMENT}
    with contextlib.ExitStack() as stack:
        # Workers import from the directory in which Ray is started before they look into PYTHONPATH.
        with contextlib.chdir(ROOT):
            if address:
                _start(address, {"runtime_env": {"env_vars": workers}})
            else:
                own, marked = stack.enter_context(_alone()), stack.enter_context(_none_left())
                # Inherited: for a `runtime_env` Ray would start workers anew, a second later than those it has at hand.
                with marked, _environment(workers):
                    _start(None, own)
        stack.callback(ray.shutdown)
        # Ray's own handler writes on the screen; the root's, where there is one, is enough.
        logging.getLogger("ray").handlers = [logging.NullHandler()]
        logging.getLogger("ray").propagate = True
        yield _nodes()


def _start(address: str | None, options: Mapping[str, Any]) -> None:
    """Join a cluster, or start one; again where its processes were not up within the 30 s that Ray waits, as on a
    machine on which much starts at once."""
    for attempt in range(1, STARTS + 1):
        running = set(psutil.Process().children(recursive=True))
        try:
            with _unsaid() if address else contextlib.nullcontext(), _signals_kept_from_children():
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray has no type for a start that takes too long
            ray.shutdown()
            _end(set(psutil.Process().children(recursive=True)) - running)
            if address or attempt == STARTS or isinstance(error, OSError | ValueError):
                raise InputError(_why_not(error, address)) from error


@contextlib.contextmanager
def _none_left() -> Iterator[contextlib.AbstractContextManager[None]]:
    """Kill what is there of Ray's processes at the body's end, or when this process is killed: some outlive the one
    that started them by minutes, or hang for good.

    Yields:
        A context in which Ray is to be started. Its processes, and theirs, are known by their environment.
    """
    mark = secrets.token_hex(16)

    with afterwards(KILL_MARKED, f"{MARK}={mark}"):
        yield _environment({MARK: mark})


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with these variables, for processes that are started in the body."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _signals_kept_from_children() -> Iterator[None]:
    """Processes that are started in the body do not end by what a closed terminal, or SLURM before its time limit,
    sends to all of a job; they are needed for the checkpoints. Ray sees to Ctrl-C itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Drop what C++ writes to standard error beside the exception that says why a cluster cannot be joined."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _end(processes: set[psutil.Process]) -> None:
    """End what a failed start left."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def cluster_address(environment: Mapping[str, str]) -> str | None:
    """`HOST:PORT` of the cluster that `RAY_ADDRESS` names, at which something answers; None for Ray of one's own.

    `auto` is the cluster that `ray start` began on this machine, and never one that another program keeps for itself.

    Raises:
        InputError: it names no cluster, or none answers.
    """
    given = environment.get("RAY_ADDRESS", "").strip()
    if given in ("", "local"):
        return None
    place, alone = f"RAY_ADDRESS {given}", "unset it to start Ray on this machine for this sweep alone"
    scheme, separator, _ = given.partition("://")
    if separator and scheme in ("http", "https"):
        submit = "ray job submit --working-dir . -- python sweeps/kl_ablation.py …"
        raise InputError(f"{place}: this is what `ray job submit` takes; run `{submit}`, or {alone}")
    if separator:
        raise InputError(f"{place}: Ray Client runs no sweep; give HOST:PORT on a node of the cluster, or {alone}")
    if given == "auto":
        found = read_ray_address()
        if not found:
            raise InputError(f"{place}: `ray start` has begun no cluster on this machine; give HOST:PORT, or {alone}")
        if not _answers(found):
            raise InputError(f"{place}: the cluster that `ray start` began, {found}, is gone; `ray stop`, or {alone}")
        return str(found)
    try:
        address = str(services.canonicalize_bootstrap_address(given))
    except ValueError:
        raise InputError(f"{place}: must be HOST:PORT, auto or local; {alone}") from None
    if not _answers(address):
        raise InputError(f"{place}: no Ray cluster answers; {alone}")
    return address


def _answers(address: str) -> bool:
    """Whether a server answers there that speaks gRPC's protocol, as Ray's does; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as connection:
            connection.sendall(HTTP2_PREFACE)
            return connection.recv(9)[3:4] == HTTP2_SETTINGS
    except (OSError, ValueError, OverflowError):
        return False


@contextlib.contextmanager
def _alone() -> Iterator[dict[str, Any]]:
    """What `ray.init` takes to start Ray for this sweep alone; its processes are told the rest by their environment,
    which is for the body."""
    if (file := os.environ.get("RAY_AUTH_TOKEN_PATH")) and not os.access(file, os.R_OK):
        raise InputError(f"RAY_AUTH_TOKEN_PATH {file}: cannot be read; unset it to have a token made for this sweep")
    before = dict(os.environ)
    # Of one machine: on the loopback interface, here and in the processes below.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled":
        os.environ["RAY_AUTH_MODE"] = "token"  # a word that Ray does not know would switch it off
    if not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        # The file in HOME, which Ray would make, may be unwritable, and sweeps that begin at once would overwrite it.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _read_environment_again()
    own: dict[str, Any] = {
        "num_cpus": usable_cpus(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    if directory := short_directory(os.environ):
        own["_temp_dir"] = directory
    try:
        yield own
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = True
        for name in (ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})
        _read_environment_again()


def _read_environment_again() -> None:
    """Have Ray forget which authentication it knew of."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def short_directory(environment: Mapping[str, str]) -> str | None:
    """Where Ray's files go if the paths of its sockets would be too long in `RAY_TMPDIR` or `TMPDIR`; else None."""
    system = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    length = len(os.fsencode(os.path.abspath(system))) + len("/ray") + SOCKET_BELOW
    return SHORT if length > LONGEST_SOCKET else None


def _why_not(error: Exception, address: str | None) -> str:
    """One line for what kept Ray from starting, or from being joined."""
    said = " ".join(str(error).split())[:SAID] or type(error).__name__
    if address is None:
        return f"starting Ray on this machine: {said}; RAY_TMPDIR names a writable directory for its files"
    given = os.environ["RAY_ADDRESS"].strip()
    where = f"RAY_ADDRESS {given}" + (f" ({address})" if given != address else "")
    token = "" if is_token_auth_enabled() else " and RAY_AUTH_MODE=token"
    mend = f"give a cluster of this version of Ray and Python, with its token as RAY_AUTH_TOKEN{token}, or unset it"
    return f"{where}: cannot be joined ({said}); {mend}"


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
