"""What a command costs with every process that it starts: wall time, CPU time, memory, and when it was first done."""

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "PROCESS_TREE_MARK"
CPU_EVERY_S = 0.2
MEMORY_EVERY_S = 1.0
"""Reading each process's share of its pages takes milliseconds."""


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float
    """User and system time of all its processes, as last seen while they lived."""
    peak_mb: float
    """The most that all of them held at a time; a page that several share counts once (PSS)."""
    first_s: float
    """From its start until `done` was first true."""
    other_s: float
    """CPU seconds of the machine meanwhile that were not its processes': high where something disturbed it."""


class Tree:
    """The processes that inherited a mark in their environment: Ray's are not all children of what starts them."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._known: dict[int, psutil.Process | None] = {}
        self._cpu_s: dict[tuple[int, float], float] = {}

    def processes(self) -> list[psutil.Process]:
        """Those that live."""
        pids = psutil.pids()
        self._known = {pid: process for pid, process in self._known.items() if pid in pids}
        for pid in pids:
            if pid not in self._known:
                self._known[pid] = None
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if process.environ().get(MARK) == self._mark:
                        self._known[pid] = process
        return [process for process in self._known.values() if process is not None]

    def cpu_s(self) -> float:
        """Seconds of all so far, of those that have ended as well."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu_s[process.pid, process.create_time()] = times.user + times.system
        return sum(self._cpu_s.values())

    def memory_mb(self) -> float:
        """What all hold now."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 2**20


def cost_of(command: Sequence[str], environment: Mapping[str, str], log: Path, done: Callable[[], bool]) -> Cost:
    """Run a command to its end.

    Args:
        log: where its output goes.
        done: whether its first result is there.

    Raises:
        RuntimeError: it failed, with the last lines of what it wrote.
    """
    mark = uuid.uuid4().hex
    tree, first_s, peak_mb, measured_at = Tree(mark), float("nan"), 0.0, 0.0
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        started, machine_s = time.monotonic(), _machine_s()
        process = subprocess.Popen(
            command, env={**os.environ, **environment, MARK: mark}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                tree.cpu_s()
                now = time.monotonic()
                if first_s != first_s and done():
                    first_s = now - started
                if now - measured_at >= MEMORY_EVERY_S:
                    peak_mb, measured_at = max(peak_mb, tree.memory_mb()), now
                time.sleep(CPU_EVERY_S)
        finally:
            process.terminate()
        wall_s = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    cpu_s = tree.cpu_s()
    return Cost(wall_s, cpu_s, peak_mb, first_s, _machine_s() - machine_s - cpu_s)


def _machine_s() -> float:
    """Seconds that all cores have worked."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)
