"""What a training run shows while it runs: its lines, and on a terminal a bar that stays below them."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cbtrain.training.metrics import Metrics, console_line

LINE_EVERY = 10
"""Steps between lines, where metrics are logged as often; held-out evaluations always have theirs."""


class TrainingConsole:
    """The screen of one run of `steps` updates.

    Args:
        console: where to; standard output by default.
        shown: False on every rank but the first, which then shows nothing.
    """

    def __init__(self, steps: int, console: Console | None = None, shown: bool = True) -> None:
        self._console = console or Console(quiet=not shown)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal or not shown,
        )
        self._task = self._bar.add_task("", total=steps)

    def advance(self, step: int) -> None:
        """So many updates are done."""
        self._bar.update(self._task, completed=step)

    def report(self, metrics: Metrics) -> None:
        """Print the line of a step, where one is due."""
        if metrics["step"] % LINE_EVERY == 0 or "eval_loss_reroute" in metrics:
            self.say(console_line(metrics))

    def say(self, text: str) -> None:
        """Print a line as it is, however narrow the terminal."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "TrainingConsole":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
