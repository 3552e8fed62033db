"""What can befall a sweep: each a function that waits for its moment, drawn at random, and strikes."""

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import files
from pathlib import Path

import pandas as pd
import psutil
from commands import Sweep

TRIALS, STEPS = 5, 30
"""Of the sweep that is disturbed."""
PATIENCE_S = 600.0
SITECUSTOMIZE = Path(__file__).parent / "in_a_trial"
"""Where the `sitecustomize` is that puts faults into a trial."""


class Broken(Exception):
    """A fault came too late: the sweep had ended."""


@dataclass
class Disturbed:
    """One sweep that a fault meets."""

    place: Path
    sweep: Sweep
    rng: random.Random
    ended: dict[str, str] = field(default_factory=dict)
    """Status by trial before the fault."""

    @property
    def run(self) -> Path:
        return self.place / "run"

    def rows(self) -> pd.DataFrame:
        try:
            return pd.read_csv(self.run / "trials.csv")
        except (OSError, ValueError):
            return pd.DataFrame({"trial_id": [], "status": []})

    def wait_for(self, true: Callable[[], bool], every: float = 0.05) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if self.sweep.process.poll() is not None or time.monotonic() > deadline:
                raise Broken
            time.sleep(every)

    def wait_for_a_step(self) -> str:
        """A trial, drawn at random, that has made a step, drawn at random, of the trials' steps."""
        trial, steps = f"t{self.rng.randrange(TRIALS):03d}", self.rng.randrange(1, STEPS - 5)
        metrics = self.run / "trials" / trial / "metrics.jsonl"
        self.wait_for(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= steps)
        return trial

    def note(self) -> None:
        """What has ended by now."""
        rows = self.rows()
        self.ended = {row.trial_id: row.status for row in rows.itertuples() if row.status != "running"}

    def children(self, name: str) -> list[psutil.Process]:
        return [process for process in self.sweep.processes() if name in " ".join(_words(process))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def driver_killed(at: Disturbed) -> None:
    at.wait_for_a_step()
    at.note()
    at.sweep.process.kill()


def _killed_while_writing(pattern: str) -> Callable[[Disturbed], None]:
    def fault(at: Disturbed) -> None:
        nth = at.rng.randrange(4)
        seen: set[Path] = set()

        def written() -> bool:
            seen.update(at.run.glob(pattern))
            return len(seen) > nth

        with contextlib.suppress(Broken):
            at.wait_for(written, every=0.0005)
        at.note()
        at.sweep.process.kill()

    return fault


def _killed_at_the_journals_next_line(at: Disturbed) -> None:
    at.wait_for_a_step()
    size = (at.run / "study.log").stat().st_size
    at.wait_for(lambda: (at.run / "study.log").stat().st_size != size, every=0.0005)
    at.note()
    at.sweep.process.kill()


def worker_killed(at: Disturbed) -> None:
    trial = at.wait_for_a_step()
    at.note()
    pid = (at.run / "trials" / trial / "lock").read_text().rpartition(":")[2]
    with contextlib.suppress(psutil.Error, ValueError):
        psutil.Process(int(pid)).kill()


def raylet_killed(at: Disturbed) -> None:
    at.wait_for_a_step()
    at.note()
    for process in at.children("raylet/raylet"):
        process.kill()


def memory_taken(at: Disturbed) -> None:
    at.wait_for_a_step()
    at.note()
    taken = bytearray(0)
    with contextlib.suppress(Broken, MemoryError):
        memory = psutil.virtual_memory()
        taken = bytearray(b"x") * int(MEMORY_MARGIN * memory.total * 1.5)
        time.sleep(4)
    del taken


MEMORY_MARGIN = 0.12
"""The threshold lies by this share of the machine's memory above what is used when the sweep starts."""


def _signalled(name: str) -> Callable[[Disturbed], None]:
    def fault(at: Disturbed) -> None:
        at.wait_for_a_step()
        at.note()
        at.sweep.process.send_signal(getattr(signal, name))

    return fault


def by_itself(at: Disturbed) -> None:
    """A fault that is in the sweep from its start; it waits for one that has happened."""
    at.wait_for(lambda: any(at.place.glob("happened*")))
    at.note()


def _cut(victims: Callable[[Disturbed], list[Path]]) -> Callable[[Disturbed], None]:
    def fault(at: Disturbed) -> None:
        trial = at.wait_for_a_step()
        with contextlib.suppress(Broken):
            at.wait_for(lambda: (at.run / "trials" / trial / "checkpoint" / "manifest.json").is_file())
        at.note()
        at.sweep.kill()
        found = victims(at)
        if found:
            victim = at.rng.choice(found)
            data = victim.read_bytes()
            begins = data.rstrip(b"\n").rfind(b"\n") + 1 if victim.name == "study.log" else 0  # its last record
            victim.write_bytes(data[: at.rng.randrange(begins, len(data))] if data else b"")

    return fault


def files_limited(at: Disturbed) -> None:
    """From now on driver and training processes write no file beyond a size; with it Ray's store would not start."""
    at.wait_for_a_step()
    at.note()
    limit = at.rng.randrange(5_000, 300_000)  # a checkpoint has files of up to 270 kB
    for process in (psutil.Process(at.sweep.process.pid), *at.children("ray::")):
        with contextlib.suppress(psutil.Error):
            process.rlimit(psutil.RLIMIT_FSIZE, (limit, limit))


def disk_filled(at: Disturbed) -> None:
    at.wait_for_a_step()
    at.note()
    with (at.place / "fill").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
            file.flush()


def clock_set_back(at: Disturbed) -> None:
    at.wait_for_a_step()
    at.note()
    (at.place / CLOCK).write_text("-3600s\n")


CLOCK = "clock"
"""In a sweep's place: how far its processes' clock is from the true one."""

FAULTS: dict[str, Callable[[Disturbed], None]] = {
    "driver killed": driver_killed,
    "driver killed, journal": _killed_at_the_journals_next_line,
    "driver killed, trials.csv": _killed_while_writing("trials.csv.*.tmp"),
    "driver killed, checkpoint": _killed_while_writing("trials/*/checkpoint/*.tmp"),
    "driver killed, cache": _killed_while_writing("teacher_cache/**/*.tmp"),
    "worker killed": worker_killed,
    "raylet killed": raylet_killed,
    "memory": memory_taken,
    "SIGTERM": _signalled("SIGTERM"),
    "SIGHUP": _signalled("SIGHUP"),
    "SIGUSR1": _signalled("SIGUSR1"),
    "raise": by_itself,
    "NaN": by_itself,
    "hang": by_itself,
    "checkpoint cut": _cut(
        lambda at: [file for file in at.run.glob("trials/*/checkpoint/**/*") if file.is_file()],
    ),
    "journal cut": _cut(lambda at: [at.run / "study.log"]),
    "file size": files_limited,
    "disk full": disk_filled,
    "clock back": clock_set_back,
}


def environment_for(name: str, rng: random.Random, place: Path) -> dict[str, str]:
    """What a sweep is started with for a fault that is in it from its start."""
    given: dict[str, str] = {}
    if name == "memory":
        memory = psutil.virtual_memory()
        share = (memory.total - memory.available) / memory.total + MEMORY_MARGIN
        given |= {"RAY_memory_usage_threshold": f"{share:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    if name == "clock back":
        library = next(path for path in files("libfaketime") or () if path.name.startswith("libfaketime.so")).locate()
        (place / CLOCK).write_text("+0s\n")
        given |= {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(place / CLOCK)}
        given |= {"FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}
    if name in ("raise", "NaN", "hang"):
        given["PYTHONPATH"] = str(SITECUSTOMIZE)
        given["FAULT"] = f"{name} {rng.randrange(1, STEPS)} {place / 'happened'}"
    return given
