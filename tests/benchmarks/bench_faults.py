"""Does a sweep lose anything? Faults at random moments, each followed by `--resume` until the sweep has ended.

    python -m tests.benchmarks.bench_faults [--faults 64] [--seed 0] [--only raylet]

Small real sweeps on a random model of three blocks, one trial at a time: two baselines and three ablation trials, whose
settings are fixed beforehand, so that each can be compared with that of a sweep which nothing disturbed. Every second
round of the kinds runs each trial on two workers of its own (ZeRO 2) in place of a kept process.

total      trials that have an outcome in the end, of those planned
lost       trials that had ended before the fault and have another outcome, or none, afterwards
twice      trials that are in trials.csv more than once
left       processes and files in shared memory that are there when the last command has ended
other      completed trials whose held-out metrics are not those of the undisturbed sweep, bit for bit
wordless   commands that did not end as documented: a traceback, or an exit status but 0, 1, 3, 143 and −9

Faults in the code of a trial (raise, NaN, hang) are put there by a `sitecustomize` of this benchmark. The clock is set
back by an hour for all processes, Ray's own included, by libfaketime (of the `bench` extra). Memory is really taken,
and Ray's monitor really kills: its threshold lies a little above what is used.

Two x86-64 cores, 2026-11-28, in three runs that were cut short (seeds 0 and 1 in turns; then 10 and 11 on kept
processes beside 20 on own workers, two sweeps at once on the two cores). Of all 63 sweeps 5 of 5 trials, 0 lost, 0
twice, 0 other, 0 wordless; `left` is what was not good:

                           kept process             own workers
fault                      sweeps resumed  left     sweeps resumed  left
driver killed                   3       3     0          1       1     0
driver killed, journal          3       3     0          1       1     0
driver killed, trials.csv       3       3     0          1       1     0
driver killed, checkpoint       3       3     0          1       1     0
driver killed, cache            3       3     1          1       1     0
worker killed                   3       0     0          1       0     0
raylet killed                   3       2     0          1       1     0
memory                          3       0     0          1       1     0
SIGTERM                         3       3     0          1       1     0
SIGHUP                          3       2     0          2       1     1
SIGUSR1                         2       2     0          1       1     0
raise                           2       2     0          1       0     0
NaN                             2       0     0          1       0     0
hang                            2       0     0          1       4     1
checkpoint cut                  2       2     0          not run
journal cut                     2       2     0          not run
file size                       2       1     0          not run
disk full                       2       2     0          not run
clock back                      2       0     0          not run

The first two that left something, Ray's agents and a controller of Ray Train's, were met before the driver saw to it
that nothing of Ray's outlives it, and are why it does; of "hang" on own workers a Python process was still there, and
its time limit, 20 s then, was too short for imports beside another sweep: 4 of its 5 trials failed by it. In the first
run SIGHUP was ignored, as `nohup` has it. One sweep with NaN had ended before the fault was seen.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import files
from pathlib import Path

import pandas as pd
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from commands import TINY, Sweep

TRIALS, STEPS = 5, 30
FLAGS = (
    *("--num-samples", str(TRIALS), "--baseline-seeds", "2", "--steps", str(STEPS), "--checkpoint-every", "5"),
    *("--batch-size", "8", "--warmup-steps", "2", "--eval-every", "10", "--behaviour-prompts", "0"),
    *("--lora-init-std", "0.3", "--max-concurrent", "1", "--no-calibrate", "--run-dir", "run"),
)
WAYS: dict[str, tuple[str, ...]] = {
    "kept process": (),
    "own workers": ("--workers-per-trial", "2", "--zero-stage", "2"),
}
"""Of running a trial."""
HANGS_S = {False: 20, True: 60}
"""A trial without progress for so long is ended, where one hangs; with workers of its own each begins with imports."""
PATIENCE_S = 600.0
RESUMES = 4
"""A sweep that has not ended after so many has lost its way."""
DOCUMENTED = {0, 1, 3, 143, -9}
"""Exit statuses after these faults: −9 is a driver that was killed."""
SITECUSTOMIZE = Path(__file__).parent / "faults"
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
    import signal

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


@contextlib.contextmanager
def place_for(name: str) -> Iterator[Path]:
    """Where a sweep runs: for a full disk a file system of its own."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        if name != "disk full":
            yield place
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


@dataclass(frozen=True)
class Result:
    """What came of one sweep."""

    total: int
    lost: int
    twice: int
    left: list[str]
    other: int
    wordless: list[str]
    resumes: int
    failed: int
    """Trials that failed in the end: those with NaN."""
    met: bool
    """Whether the fault met a sweep that ran."""

    @property
    def good(self) -> bool:
        return self.total == TRIALS and not (self.lost or self.twice or self.left or self.other or self.wordless)


def metrics_of(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Held-out metrics by trial that completed."""
    names = [name for name in rows if name.startswith(("eval_", "base_")) and not name.endswith("_s")]
    done = rows[rows.status == "completed"].set_index("trial_id")
    return {str(trial): {str(key): value for key, value in row.items()} for trial, row in done[names].iterrows()}


def undisturbed(model: list[str], more: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The metrics of a sweep that nothing disturbs."""
    with place_for("") as place:
        status, output, errors = Sweep(place, *model, *FLAGS, *more).wait(timeout=PATIENCE_S)
        assert status in (0, 3), output + errors
        found = metrics_of(pd.read_csv(place / "run" / "trials.csv"))
    assert len(found) == TRIALS, found
    return found


def disturb(
    name: str, model: list[str], more: tuple[str, ...], reference: dict[str, dict[str, float]], seed: int
) -> Result:
    """One sweep and its fault, resumed until it has ended."""
    rng = random.Random(f"{name} {seed}")
    with place_for(name) as place:
        if name == "hang":
            more = (*more, "--trial-timeout", str(HANGS_S[bool(more)]))
        sweep = Sweep(place, *model, *FLAGS, *more, environment=environment_for(name, rng, place))
        at, met = Disturbed(place, sweep, rng), True
        try:
            FAULTS[name](at)
        except Broken:
            met = False
        sweeps, statuses, wordless = [sweep], [], []
        for resumes in range(RESUMES + 1):  # noqa: B007  how many it took is part of the result
            status, output, errors = sweeps[-1].wait(timeout=PATIENCE_S)
            statuses.append(status)
            if status not in DOCUMENTED or "Traceback" in output + errors:
                wordless.append(f"{status}: {(errors or output)[-300:]}")
            (place / "fill").unlink(missing_ok=True)
            rows = at.rows()
            failed = rows[rows.status == "failed"]
            again = [] if failed.empty or failed.error.str.startswith("NonFinite").all() else ["--retry-failed"]
            if status in (0, 3) and len(rows) == TRIALS and not again:
                break
            if not (at.run / "sweep.json").is_file():  # it ended before there was a sweep
                sweeps.append(Sweep(place, *model, *FLAGS, *more))
            else:
                sweeps.append(Sweep(place, "--resume", "run", *again))
        rows = at.rows()
        now = dict(zip(rows.trial_id, rows.status, strict=True))
        found = metrics_of(rows)
        return Result(
            total=int((rows.status != "running").sum()),
            lost=sum(now.get(trial) != status and status == "completed" for trial, status in at.ended.items()),
            twice=int(rows.trial_id.duplicated().sum()),
            left=[leftover for each in sweeps for leftover in each.left_behind()],
            other=sum(found[trial] != reference.get(trial) for trial in found),
            wordless=wordless,
            resumes=resumes,
            failed=int((rows.status == "failed").sum()),
            met=met,
        )


def random_model(directory: Path) -> list[str]:
    """Flags for a small random model and its data, made in a directory."""
    from worlds import build_small_world

    build_small_world(directory)
    data = ["--harmful", str(directory / "harmful.jsonl"), "--benign", str(directory / "benign.jsonl")]
    return ["--model", str(directory), *data, *TINY]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help="of running a trial; without it each round has the next")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    options = parser.parse_args()
    kinds = [name for name in FAULTS if options.only in name]
    print(f"seed {options.seed}, {options.faults} faults of {len(kinds)} kinds", flush=True)
    results: dict[str, list[Result]] = defaultdict(list)
    references: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-model-") as directory:
        model = random_model(Path(directory))
        for index in range(options.faults):
            name, seed = kinds[index % len(kinds)], options.seed + index // len(kinds)
            way = options.way or [*WAYS][(index // len(kinds)) % len(WAYS)]
            more = WAYS[way]
            if more not in references:
                references[more] = undisturbed(model, more)
            began = time.monotonic()
            result = disturb(name, model, more, references[more], seed)
            results[name].append(result)
            said = "good" if result.good else f"BAD {result}"
            missed = "" if result.met else ", met no running sweep"
            took = time.monotonic() - began
            print(f"{name:26} seed {seed} {way:12} {result.resumes} resumed {took:4.0f} s  {said}{missed}", flush=True)
    print(f"\n{'fault':26} sweeps  met  total  lost  twice  left  other  wordless")
    for name, each in results.items():
        met, total = sum(result.met for result in each), sum(result.total for result in each)
        rest = [
            sum(result.lost for result in each),
            sum(result.twice for result in each),
            sum(len(result.left) for result in each),
            sum(result.other for result in each),
            sum(len(result.wordless) for result in each),
        ]
        print(f"{name:26} {len(each):6} {met:4} {total:3}/{TRIALS * len(each):<3}" + "".join(f"{n:6}" for n in rest))


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for each other take all of a busy machine
    main()
