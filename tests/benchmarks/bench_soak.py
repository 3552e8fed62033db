"""Does anything grow over 300 trials of one sweep: memory, open files, or what a trial costs beside its training?

    python -m tests.benchmarks.bench_soak [--trials 300] [--steps 4]

The embedded default at a few steps a trial, through Ray. Driver and kept processes are looked at whenever a trial has
ended; the slope over the last two thirds of the trials is that of a straight line by least squares, beside the
standard deviation of what is left. Overhead is the time from one trial's end to the next on one slot, without the
seconds that the trial trained and evaluated; its median over the first fifty trials behind the baselines, and over
the last fifty.

Two x86-64 cores, 2026-11-28, 300 trials of 4 steps, one kept process, twice. On a quiet machine in 489 s: kept process
529 to 533 MiB (1.1 a hundred trials, ± 0.4 around the line), 51 open files at both ends; overhead 0.70 s at the
beginning and 0.75 at the end, × 1.07; driver 492 to 537 MiB (28 a hundred, ± 7), of which most was Ray Tune's
statistics of trials that had ended. Without these, beside two other sweeps, in 666 s: driver 472 to 491 MiB (9 a
hundred, ± 7), open files 43 to 42; kept process 528 to 518 MiB (−1.1, ± 4.0), open files 50 to 49; what trials cost
then says nothing. Nothing left behind in either. Two runs before found what is mended since: four open files a trial in
the kept process, and a search whose model grew with the trials (× 3.4 in overhead).
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from commands import Sweep

KINDS = {"driver": "kl_ablation.py", "kept process": "ray::_Process"}
MIB = 2**20


def watched(sweep: Sweep, trials: Path) -> dict[str, list[tuple[int, float, int]]]:
    """By process, each time that a trial has ended: trials that have, MiB that it alone holds, open files."""
    seen: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    ended = -1
    while sweep.process.poll() is None:
        time.sleep(0.25)
        with contextlib.suppress(OSError, ValueError):
            now = int((pd.read_csv(trials).status != "running").sum())
            if now == ended:
                continue
            ended = now
            for process in sweep.processes():
                with contextlib.suppress(psutil.Error):
                    words = " ".join(process.cmdline())
                    for kind, name in KINDS.items():
                        if name in words:
                            memory = process.memory_full_info().uss / MIB
                            seen[f"{kind} {process.pid}"].append((ended, memory, process.num_fds()))
    return seen


def slope(points: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Of a straight line, a hundred trials, and the standard deviation around it."""
    line = np.polyfit(points, values, 1)
    return float(line[0] * 100), float((values - np.polyval(line, points)).std())


def overheads(rows: pd.DataFrame) -> pd.Series:
    """Seconds beside training and evaluation, by trial, where trials follow each other on one slot."""
    rows = rows[rows.status == "completed"].sort_values("ended_at")
    return (rows.ended_at.diff() - rows.train_s - rows.eval_s).dropna()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        flags = ["--num-samples", str(options.trials), "--steps", str(options.steps), "--warmup-steps", "1"]
        flags += ["--retain-scale", "0.3", "--lora-init-std", "0.3", "--lr", "0.01", "--eval-every", "0"]
        flags += ["--behaviour-prompts", "0", "--max-concurrent", "1", "--run-dir", "run"]
        sweep = Sweep(Path(directory), *flags, output=Path(directory, "output"))
        began = time.monotonic()
        seen = watched(sweep, Path(directory, "run", "trials.csv"))
        wall_s = time.monotonic() - began
        rows = pd.read_csv(Path(directory, "run", "trials.csv"))
        left = sweep.left_behind()
    print(f"{(rows.status == 'completed').sum()} of {options.trials} trials completed in {wall_s:.0f} s, left: {left}")
    for name, looks in seen.items():
        table = np.array([look for look in looks if look[0] >= options.trials / 3])
        if len(table) < 10:
            print(f"{name}: seen {len(table)} times in the last two thirds")
            continue
        memory, around = slope(table[:, 0], table[:, 1])
        files, _ = slope(table[:, 0], table[:, 2])
        print(
            f"{name}: {table[0, 1]:.0f} → {table[-1, 1]:.0f} MiB, {memory:+.2f} MiB a hundred trials (± {around:.2f} "
            f"around the line); open files {table[0, 2]:.0f} → {table[-1, 2]:.0f}, {files:+.2f} a hundred"
        )
    overhead = overheads(rows)
    first, last = overhead.iloc[8:58].median(), overhead.iloc[-50:].median()
    print(f"overhead a trial: {first:.2f} s at the beginning, {last:.2f} s at the end, × {last / first:.2f}")


if __name__ == "__main__":
    main()
