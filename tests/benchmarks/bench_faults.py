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
hang                            2       0     0          1       0     0
checkpoint cut                  2       2     0          1       1     0
journal cut                     2       2     0          1       1     0
file size                       2       1     0          1       0     0
disk full                       2       2     0          1       1     0
clock back                      2       0     0          not good, below

The first two that left something, Ray's agents and a controller of Ray Train's, were met before the driver saw to it
that nothing of Ray's outlives it, and are why it does. Of "hang" on own workers a worker was still there, and had kept
its CPUs from every later trial, until workers ended themselves (`sweeps.runtime.watchdog`): 591 s and four trials that
failed before, 233 s and none after. Own workers' last rows, from checkpoint cut on, are of seed 30, beside other
sweeps. There the clock that was set back kept Ray from starting workers for the fourth trial, which failed; the resume
was not reached. In the first run SIGHUP was ignored, as `nohup` has it. One sweep with NaN had ended before the fault
was seen.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from commands import TINY, Sweep

from tests.benchmarks.faults.kinds import FAULTS, PATIENCE_S, STEPS, TRIALS, Broken, Disturbed, environment_for

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
RESUMES = 4
"""A sweep that has not ended after so many has lost its way."""
DOCUMENTED = {0, 1, 3, 143, -9}
"""Exit statuses after these faults: −9 is a driver that was killed."""


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
