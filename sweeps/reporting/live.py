"""The trials of a sweep while they run: a table that stays in place, or a line an event and one a minute."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from analysis.decision import Decision
from sweeps.plan.plan import SweepPlan
from sweeps.reporting.events import EventLines
from sweeps.reporting.following import Follower, Latest
from sweeps.reporting.progress import (
    Pace,
    Progress,
    Row,
    State,
    TrialLine,
    best_so_far,
    heartbeat,
    progress,
    trial_lines,
)
from sweeps.reporting.screen import HEARTBEAT_S, SCREEN, WIDTH, Repeated

REFRESH_S = 0.5
LOOKS = 12
"""How often between two heartbeats: when the first step was made is what the time to go rests on."""
BEST_SHARE = 0.05
"""Of the time, at most, is spent on what would be chosen at the moment."""
AROUND = 4
"""Lines of the table that are no trial's: bar, header, best so far, and where the cursor stands."""
ABOVE = 14
"""Lines that are left to what was printed before, where the terminal has them."""
FEWEST = 6
"""Trials that are shown wherever the terminal holds them."""
COLUMNS = {"phase": 8, "beta_kl": 7, "T": 4, "seed": 4, "step": 8, "reroute": 7, "drift": 7, "regression": 10}
"""How wide they are at least, so that they stay where they are."""
ROOMY = 72
"""Columns from which on two spaces stand between two fields."""
COLOURS: dict[State, str] = {
    "running": "bold",
    "baseline": "",
    "ok": "green",
    "over": "red",
    "stopped": "yellow",
    "failed": "red",
}


class Trials:
    """What is known of the trials, told by the driver and by what they write while they run.

    Args:
        steps: of a trial.
        trials: the directory that holds theirs.
        decide: what would be chosen by rows of trials.csv.
        before: rows that are not news.
    """

    def __init__(
        self,
        plan: SweepPlan,
        steps: int,
        trials: Path,
        decide: Callable[[Sequence[Row]], Decision],
        before: Sequence[Row] = (),
    ) -> None:
        self._plan, self._steps, self._decide = plan, steps, decide
        self._follower, self._pace, self._began = Follower(trials), Pace(), time.monotonic()
        self._rows: dict[str, Row] = {str(row["trial_id"]): row for row in before}
        self._tolerance = plan.tolerance
        self._events = None if SCREEN.terminal else EventLines(plan, before)
        self._best, self._best_of, self._best_again = best_so_far(None), 0, 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return object, ()  # Tune pickles whatever its searcher holds, and nothing reads this back

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the screen up to date while the body runs."""
        if SCREEN.terminal:
            with SCREEN.in_place(self.draw, REFRESH_S):
                yield
            return
        self._beaten = time.monotonic()
        beats = Repeated(self._beat, HEARTBEAT_S / LOOKS)
        try:
            yield
        finally:
            beats.stop()

    def update(self, rows: Sequence[Row]) -> None:
        """Take the plan's rows, of which some may be new or have ended."""
        known = dict(self._rows)
        for row in rows:
            trial_id = str(row["trial_id"])
            if trial_id in known and known[trial_id]["status"] != row["status"]:
                del known[trial_id]  # to the end: they are in the order in which they ended
            known[trial_id] = row
        self._tolerance, self._rows = self._plan.tolerance, known
        if self._events is None:
            return
        try:
            self._events.update(rows)
        except OSError:
            raise  # nobody reads any more, or the disk is full
        except Exception:
            logging.getLogger(__name__).exception("an event could not be told")

    def progress(self) -> Progress:
        """How far the sweep is now."""
        rows = list(self._rows.values())
        budget, now = self._plan.budget.total, time.monotonic()
        return progress(rows, self._latest(rows), budget, self._steps, now, self._began, self._pace)

    def draw(self, columns: int, rows: int) -> RenderableType:
        """Table, bar and best setting for a terminal of so many columns and rows."""
        of_trials = list(self._rows.values())
        running = sum(row["status"] == "running" for row in of_trials)
        room = min(rows - AROUND, max(running + 2, FEWEST, rows - ABOVE))
        lines = trial_lines(of_trials, self._latest(of_trials), self._steps, self._tolerance, room)
        self._look_for_the_best(of_trials)
        width = min(WIDTH, columns)
        best = Text(f" best so far {self._best}", no_wrap=True, overflow="ellipsis")
        best.truncate(width, overflow="ellipsis")
        return Group(bar(self.progress(), width), table(lines, width), best)

    def _beat(self) -> None:
        """Look how far the sweep is, and say so when a minute has passed."""
        now, at = time.monotonic(), self.progress()
        if now - self._beaten >= HEARTBEAT_S:
            self._beaten = now
            SCREEN.say(heartbeat(at))

    def _latest(self, rows: Sequence[Row]) -> dict[str, Latest]:
        unknown = [str(row["trial_id"]) for row in rows if row["status"] == "running" or row.get("steps") is None]
        return {trial_id: self._follower.latest(trial_id) for trial_id in unknown}

    def _look_for_the_best(self, rows: Sequence[Row]) -> None:
        """What would be chosen now, where trials have ended since and it does not take too much of the time."""
        ended = [row for row in rows if row["status"] != "running"]
        began = time.monotonic()
        if len(ended) == self._best_of or began < self._best_again or self._tolerance is None:
            return
        self._best = best_so_far(self._decide(ended))
        took = time.monotonic() - began
        self._best_of, self._best_again = len(ended), began + took / BEST_SHARE


def bar(at: Progress, width: int) -> RenderableType:
    """How many of the steps are done, as a bar, with the counts and times beside it."""
    text = at.text()
    grid = Table.grid(padding=(0, 1))
    made, of = at.steps_run, at.steps_run + at.steps_left
    grid.add_row(
        "", ProgressBar(total=max(1, of), completed=made, width=max(4, width - len(text) - 3)), Text(text, no_wrap=True)
    )
    return grid


def table(lines: Sequence[TrialLine], width: int) -> Table:
    """Trials, a line each, in at most so many columns."""
    drawn = Table(box=None, padding=(0, 1), collapse_padding=width < ROOMY, header_style="bold", width=width)
    for name, at_least in COLUMNS.items():
        left = name in ("phase", "regression")
        justify: Literal["left", "right"] = "left" if left else "right"
        drawn.add_column(name, no_wrap=True, justify=justify, overflow="ellipsis", min_width=min(at_least, width // 8))
    drawn.columns[-1].ratio = 1
    for line in lines:
        drawn.add_row(
            *(line.phase, line.beta_kl, line.temperature, line.seed, line.step, line.reroute, line.drift),
            Text(line.regression, COLOURS[line.state], overflow="ellipsis", no_wrap=True),
            style="bold" if line.state == "running" else None,
        )
    return drawn
