"""A sweep on Weights & Biases: a run a trial while it trains, and one for the decision with its figures, in one group.

    python -m sweeps.reporting.follower RUN_DIR --project P --mode offline

follows a run directory until standard input ends: it reads which trials run and have ended from trials.csv, and what
they log from their metrics.jsonl. The sweep starts it beside itself, so that whatever W&B does or prints neither delays
nor fails a trial. It starts no Ray and imports no torch.
"""

import argparse
import contextlib
import html
import json
import math
import select
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cbtrain.utils.files import stamp, write_whole
from cbtrain.utils.metrics_file import read_metrics
from cbtrain.utils.tracking import Mode, Tracker, open_tracker

SUMMARY = "decision"
"""Name of the run that is no trial's."""
LOGGED = Path("wandb", "logged.txt")
"""What a run directory's finished runs on W&B are, a line each: name and place. A sweep that is resumed leaves them."""
LINKS = Path("wandb", "links.html")
POLL_S = 1.0
INTERRUPTED = 255
"""Exit code of the run of a trial that had not ended with its sweep; a sweep that is resumed continues it."""

Row = dict[str, Any]


class Opened(NamedTuple):
    """Opens the run of a part of the sweep: its name, its settings, what kind of run it is, and its tags."""

    run_dir: Path
    project: str
    mode: Mode

    def __call__(self, part: str, config: dict[str, Any], job_type: str, tags: Sequence[str]) -> Tracker:
        return open_tracker(
            self.project,
            self.mode,
            directory=self.run_dir,
            name=f"{self.run_dir.name}-{part}",
            config=config,
            job_type=job_type,
            group=self.run_dir.name,
            tags=tags,
            part=part,
        )


def main() -> int:
    """Follow a run directory until standard input ends; its exit status is 0, whatever W&B did."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.reporting.follower", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--project", required=True)
    parser.add_argument("--mode", choices=("online", "offline"), default="online")
    arguments = parser.parse_args()
    opened = Opened(arguments.run_dir, arguments.project, arguments.mode)
    trials = FollowedTrials(arguments.run_dir, opened)
    goes_on = True
    while goes_on:
        goes_on = not select.select([sys.stdin], [], [], POLL_S)[
            0
        ]  # nothing is written there: it is readable at its end
        trials.follow()
    trials.leave()
    record = _record(arguments.run_dir)
    is_new = trials.finished or SUMMARY not in logged_runs(arguments.run_dir)
    if record.get("status") == "finished" and is_new:
        log_decision(arguments.run_dir, record, opened)
    return 0


class FollowedTrials:
    """The trials of a run directory, each a run from its first line of metrics until it has ended."""

    def __init__(self, run_dir: Path, opened: Opened) -> None:
        self._run_dir = run_dir
        self._opened = opened
        self._runs: dict[str, FollowedTrial] = {}
        self._done = {*logged_runs(run_dir)}
        self._read: tuple[list[int], list[Row]] = ([], [])
        self.finished = 0
        """Trials whose runs were finished, W&B willing."""

    def follow(self) -> None:
        """Log what is new: of trials that run, and of those that have ended."""
        for row in self._rows():
            name = str(row["trial_id"])
            if name in self._done:
                continue
            if name not in self._runs:
                directory = self._run_dir / "trials" / name
                if row["status"] == "running" and not (directory / "metrics.jsonl").is_file():
                    continue
                self._runs[name] = FollowedTrial(directory, self._tracker(row, directory))
            self._runs[name].follow()
            if row["status"] != "running":
                self._done.add(name)
                where = self._runs.pop(name).end(row)
                if where is not None:
                    _note(self._run_dir, name, where)
                    self.finished += 1

    def leave(self) -> None:
        """Finish the runs of trials that have not ended; those of a sweep that is resumed go on there."""
        for trial in self._runs.values():
            trial.tracker.close(INTERRUPTED)

    def _rows(self) -> list[Row]:
        path = self._run_dir / "trials.csv"
        with contextlib.suppress(FileNotFoundError):
            if (now := stamp(path)) != self._read[0]:
                self._read = now, [_without_blanks(row) for row in pd.read_csv(path).to_dict("records")]
        return self._read[1]

    def _tracker(self, row: Row, directory: Path) -> Tracker:
        about = {name: row[name] for name in ("trial_id", "phase", "beta_kl", "kl_temperature", "seed")}
        path = directory / "config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        preset = _record(self._run_dir).get("preset", "")
        return self._opened(str(row["trial_id"]), settings | about, "trial", [row["phase"], *filter(None, [preset])])


class FollowedTrial:
    """One trial, and what of its metrics.jsonl was logged."""

    def __init__(self, directory: Path, tracker: Tracker) -> None:
        self.tracker = tracker
        self._metrics = directory / "metrics.jsonl"
        self._read: list[int] = []
        self._step = 0

    def follow(self) -> None:
        """Log the lines that are new. A trial that began anew, or from a checkpoint, is followed from where it was."""
        with contextlib.suppress(FileNotFoundError):
            if (now := stamp(self._metrics)) == self._read:
                return
            self._read = now
        for values in read_metrics(self._metrics, skip_damaged=True):
            if values["step"] > self._step:
                self._step = int(values["step"])
                self.tracker.log(values, step=self._step)

    def end(self, row: Row) -> str | None:
        """Finish the run with the trial's row of trials.csv; where it is, None where W&B did not take all of it."""
        self.tracker.tag(str(row["status"]))
        if "feasible" in row:
            self.tracker.tag("within limit" if row["feasible"] else "over limit")
        self.tracker.summary(row)
        taken, where = self.tracker.active, self.tracker.where
        self.tracker.close(int(row["status"] == "failed"))
        return where if taken else None


def log_decision(run_dir: Path, record: dict[str, Any], opened: Opened) -> None:
    """Write the sweep's report, and log its decision, its figures, and where everything is."""
    from analysis.pick_beta import write_report  # seconds of imports, at the very end

    write_report(run_dir)
    report = run_dir / "report"
    decision = json.loads((report / "decision.json").read_text())
    links = {
        "report": str(report / "report.html"),
        "decision": str(report / "decision.json"),
        "run_dir": str(run_dir),
        **{name: where for name, where in logged_runs(run_dir).items() if name != SUMMARY and where},
    }
    tags = [decision["verdict"], *filter(None, [record.get("preset")])]
    tracker = opened(SUMMARY, record["config"] | record["settings"], SUMMARY, tags)
    outcome = {"tolerance": record["tolerance"], "wall_s": record["wall_s"], "links": links}
    tracker.summary({**decision, **outcome})
    for figure in sorted((report / "figures").glob("*.png")):
        tracker.figure(figure.stem, figure)
    with contextlib.suppress(OSError):
        write_whole(run_dir / LINKS, "\n".join(_links_page(links)))
        tracker.figure("link list", run_dir / LINKS)
    taken, where = tracker.active, tracker.where
    tracker.close()
    if taken:
        _note(run_dir, SUMMARY, where)


def _links_page(links: dict[str, str]) -> Iterator[str]:
    """A list of what can be opened from the run's page; what is no page has its path."""
    yield "<ul>"
    for name, where in links.items():
        shown = html.escape(where)
        if where.startswith(("http://", "https://")):
            shown = f'<a href="{shown}" target="_blank" rel="noreferrer">{shown}</a>'
        yield f"<li>{html.escape(name)}: {shown}</li>"
    yield "</ul>"


def logged_runs(run_dir: Path) -> dict[str, str]:
    """The finished runs of a run directory by name, with their pages, or offline their directories."""
    path = run_dir / LOGGED
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: where for name, _, where in (line.partition(" ") for line in lines)}


def _note(run_dir: Path, name: str, where: str) -> None:
    (run_dir / LOGGED).parent.mkdir(exist_ok=True)
    with (run_dir / LOGGED).open("a") as file:
        file.write(f"{name} {where}\n")


def _record(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "sweep.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _without_blanks(row: Row) -> Row:
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


if __name__ == "__main__":
    sys.exit(main())
