"""What all trials of a sweep know of their teacher before the first of them runs: its cache, and its norms."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cbtrain.config import CircuitBreakerConfig, InputError
from sweeps.execution.context import TrialContext
from sweeps.reporting.console import wrapped
from sweeps.reporting.screen import SCREEN
from sweeps.runtime.failures import root_cause
from sweeps.runtime.processes import Processes
from sweeps.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from cbtrain.teacher_cache.plan import CachePlan
    from cbtrain.training.loop import TeacherPass


@dataclass(frozen=True)
class CacheReport:
    """What it took to fill a cache, and what a trial reads from it; in sweep.json."""

    rows_computed: int
    teacher_s: float
    """Of which the teacher ran."""
    wall_s: float
    """For loading the model and writing the shards as well."""
    rows_read_by_a_trial: int

    def after(self, earlier: object) -> "CacheReport":
        """The two together, `earlier` being what sweep.json has kept of a session before, if anything."""
        if not isinstance(earlier, dict):
            return self
        sums = {name: getattr(self, name) + earlier.get(name, 0) for name in ("rows_computed", "teacher_s", "wall_s")}
        return replace(self, **sums)


def with_teacher(
    context: TrialContext, plan: "CachePlan", processes: Processes | None, run: RunDirectory
) -> TrialContext:
    """The trials' context with a filled cache, and norms if they are needed; both are written to sweep.json.

    Without a cache, and a line why, where it cannot be filled.
    """
    from cbtrain.teacher_cache.plan import LIVE, CachePlan, CacheUnavailableError

    if plan.directory is None:
        if norms_are_missing(context.config):
            context = _with_norms(context, run_teacher(plan, context, processes)[1], run)
        return context
    earlier = run.record.get("teacher_cache")
    try:
        report, norms = run_teacher(plan, context, processes)
    except CacheUnavailableError as error:
        SCREEN.say(*wrapped(f"cache     off, {LIVE}: {error}"))
        run.update(teacher_cache=f"off: {error}")
        return with_teacher(context, CachePlan(None, plan.says), processes, run)
    run.update(teacher_cache={"directory": plan.directory, **asdict(report.after(earlier))})
    return replace(_with_norms(context, norms, run), teacher_cache=plan.directory)


def _with_norms(context: TrialContext, norms: tuple[float, ...] | None, run: RunDirectory) -> TrialContext:
    """The context with norms that are the same for all trials, now and when the sweep is resumed."""
    if norms is None:
        return context
    context = replace(context, config=replace(context.config, retain_norms=norms))
    run.update(config=asdict(context.config))
    return context


def norms_are_missing(config: CircuitBreakerConfig) -> bool:
    """Whether trials would each measure the norms that their retain loss takes distances by."""
    return config.retain_norm == "relative" and config.retain_norms is None


def run_teacher(
    plan: "CachePlan", context: TrialContext, processes: Processes | None
) -> tuple[CacheReport, tuple[float, ...] | None]:
    """Compute what a planned cache lacks, with a progress bar, and the norms, on what a trial runs on.

    Raises:
        CacheUnavailableError: whatever went wrong with a cache.
        InputError: whatever went wrong without one.
    """
    from cbtrain.teacher_cache.plan import CacheUnavailableError
    from sweeps.execution.training import run_once

    started, directory = time.monotonic(), plan.directory
    work = functools.partial(_run_teacher, context.config, directory)
    what = f"runs on {plan.rows:,} rows for the cache"
    try:
        with SCREEN.phase("teacher", what, plan.bytes) as advance, _watching(directory, advance):
            found: TeacherPass = run_once(work, context, processes, "teacher_cache")
    except Exception as error:
        if directory is None:
            raise InputError(f"--model {context.config.model}: its norms: {root_cause(error)}") from error
        raise CacheUnavailableError(f"{directory}: {root_cause(error)}") from error
    seconds = time.monotonic() - started
    return CacheReport(found.rows_computed, found.teacher_s, seconds, plan.rows_read_by_a_run), found.retain_norms


def _run_teacher(config: CircuitBreakerConfig, directory: Path | None, _report: Callable) -> "TeacherPass":
    from cbtrain.training import loop

    return loop.run_teacher(config, directory)


@contextlib.contextmanager
def _watching(directory: Path | None, advance: Callable[[int], None]) -> Iterator[None]:
    """Tell of bytes that other processes add to a cache, if there is one."""
    from cbtrain.teacher_cache.store import bytes_there

    if directory is None:
        yield
        return
    ended = threading.Event()

    def watch(before: int) -> None:
        while not ended.wait(0.5):
            now = bytes_there(directory)
            advance(now - before)
            before = now

    thread = threading.Thread(target=watch, args=(bytes_there(directory),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
