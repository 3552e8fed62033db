"""The one place that the sweep writes to: a terminal, where lines move; a file or pipe; nothing before the end.

It imports only what is light, since its first line comes before the libraries are loaded.
"""

import atexit
import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

HEARTBEAT_S = 60.0
"""Where no line moves, one is added as often."""
WIDTH = 80
SILENT = ("--quiet", "--help", "--help-all", "-h")
"""Flags with which nothing is said before the command line is read."""


class Shown(Protocol):
    """A phase on the screen."""

    def advance(self, amount: float) -> None:
        """Count so much more of it as done."""

    def stop(self) -> None:
        """Take it away."""


class Repeated:
    """Calls something every so many seconds, in a thread. What it raises is logged, once, and stops nothing."""

    def __init__(self, work: Callable[[], None], every_s: float) -> None:
        self._work, self._every_s, self._ended, self._logged = work, every_s, threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Call it no more; returns when a call that runs has ended, or takes long."""
        self._ended.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._work()
            except Exception:
                if not self._logged:
                    logging.getLogger(__name__).exception("the screen could not be kept up to date")
                self._logged = True


class Screen:
    """Where the sweep writes. One thing at a time stays in place on a terminal; lines go above it."""

    def __init__(self) -> None:
        self.quiet = False
        """Whether nothing is said but the end."""
        self._file: TextIO | None = None
        self._console: Console | None = None
        self._phase: tuple[str, Shown] | None = None

    @property
    def terminal(self) -> bool:
        """Whether lines can move where this is written."""
        return not self.quiet and self._stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and rows of the terminal at this moment."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns, rows = 0, 0
        return ConsoleDimensions(columns or WIDTH, rows or 24)

    def start(self, words: list[str]) -> None:
        """Say at once that the command of these words was heard: what follows imports for seconds."""
        if not set(SILENT) & set(words):
            self.begin("loading", "libraries")

    def say(self, *lines: str) -> None:
        """Print lines, unless only the end is asked for."""
        if not self.quiet:
            self.conclude(*lines)

    def conclude(self, *lines: str) -> None:
        """Print lines that are always wanted."""
        console = self._console
        for line in lines:
            if console is None:
                print(line, file=self._stream, flush=True)
            else:
                console.print(Text(line), soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, label: str, what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Show what is going on while the body runs: a bar or spinner, else a line, and another each minute.

        Args:
            label: of at most nine letters.
            what: in some words.
            total: how much there is to do, where that is known.

        Yields:
            What is to be called with the amount that was done.
        """
        self.begin(label, what, total)
        shown = self._phase
        try:
            yield shown[1].advance if shown else _nothing
        finally:
            self.end()

    def begin(self, label: str, what: str, total: float | None = None) -> None:
        """Show a phase until the next one begins, or `end`; one that is shown already goes on."""
        text = f"{label:<9} {what}"
        if self._phase is not None and self._phase[0] == text:
            return
        self.end()
        if self.terminal:
            self._phase = text, _Bar(self.live_console(), text, total, self._released)
        elif not self.quiet:
            self._phase = text, _Lines(self.say, text, total)

    def end(self) -> None:
        """Take away the phase that is shown, if any."""
        if self._phase is not None:
            self._phase[1].stop()
            self._phase = None

    def live_console(self) -> Console:
        """The console of what stays in place from now on; lines go above it until `_released`."""
        self._console = Console(file=self._stream, force_terminal=True, highlight=False, emoji=False, markup=False)
        self._console.size = self.size
        return self._console

    @contextlib.contextmanager
    def in_place(self, draw: Callable[[int, int], RenderableType], every_s: float) -> Iterator[None]:
        """Draw something for columns and rows of the terminal, again and again, while the body runs."""
        self.end()
        live = _Resized(self.live_console(), lambda: self.size, draw)
        with live:
            repeated = Repeated(live.redraw, every_s)
            try:
                yield
            finally:
                repeated.stop()
                self._released()

    @contextlib.contextmanager
    def kept_apart(self) -> Iterator[None]:
        """Write to where this process wrote so far, while the body sends the process's output elsewhere."""
        try:
            with open(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding, errors="replace") as file:
                self._file = file
                yield
        finally:
            self.end()
            self._file = None

    @property
    def _stream(self) -> TextIO:
        return self._file or sys.stdout

    def _released(self) -> None:
        self._console = None


class _Bar:
    """A phase on a terminal: a bar where its end is known, else a spinner, with the time that it has taken."""

    def __init__(self, console: Console, text: str, total: float | None, released: Callable[[], None]) -> None:
        known = (BarColumn(20), TaskProgressColumn()) if total else ()
        # "line" is of plain letters, which every terminal has.
        columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), *known, TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        self._task = self._progress.add_task(text, total=total)
        self._released = released
        self._progress.start()

    def advance(self, amount: float) -> None:
        self._progress.advance(self._task, amount)

    def stop(self) -> None:
        self._progress.stop()
        self._released()


class _Lines:
    """A phase where no line moves: one when it begins, and one a minute."""

    def __init__(self, say: Callable[[str], None], text: str, total: float | None) -> None:
        self._say, self._label, self._total = say, text[:10], total
        self._done, self._began = 0.0, time.monotonic()
        say(text)
        self._beats = Repeated(self._beat, HEARTBEAT_S)

    def advance(self, amount: float) -> None:
        self._done += amount

    def stop(self) -> None:
        self._beats.stop()

    def _beat(self) -> None:
        self._say(beat(self._label, time.monotonic() - self._began, self._done, self._total))


def beat(label: str, elapsed_s: float, done: float, total: float | None) -> str:
    """How far a phase is, in a line."""
    line = f"{label}{clock(elapsed_s)} so far"
    if total and done:
        line += f", {min(1.0, done / total):.0%} done, about {clock(elapsed_s * max(0.0, total / done - 1))} to go"
    return line


def clock(seconds: float) -> str:
    """`0:27`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Resized(Live):
    """What stays in place, also on a terminal whose width changes: one that grows narrow folds the lines drawn."""

    def __init__(
        self, console: Console, size: Callable[[], ConsoleDimensions], draw: Callable[[int, int], RenderableType]
    ) -> None:
        super().__init__(
            "",  # what draws may fail, which is no reason not to begin
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._size, self._draw = size, draw

    def redraw(self) -> None:
        """Draw it as it is now, for the terminal as it is now."""
        size = self._size()
        drawn = self._draw(*size)
        with self._lock:
            if size.width < self.console.size.width:
                lines = self.console.render_lines(self.renderable, pad=False)
                lengths = [sum(segment.cell_length for segment in line) for line in lines]
                rows = sum(max(1, math.ceil(length / size.width)) for length in lengths)
                self._live_render._shape = size.width, rows  # how far up it moves before it draws
            self.console.size = size
            self.update(drawn, refresh=True)


def _nothing(_amount: float) -> None:
    """Where a phase is not shown."""


SCREEN = Screen()
atexit.register(SCREEN.end)
