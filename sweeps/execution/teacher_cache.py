"""The teacher cache that all trials of a sweep read, filled before the first of them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.reporting.console import CacheReport

if TYPE_CHECKING:
    from cbtrain.teacher_cache.plan import CachePlan
    from sweeps.execution.trial import TrialContext


def fill_cache(plan: "CachePlan", context: "TrialContext") -> CacheReport:
    """Compute what a planned cache lacks, with a progress bar, on what a trial runs on.

    Raises:
        CacheUnavailableError: it cannot be read or written.
    """
    from sweeps.reporting.console import bar

    assert plan.directory is not None
    started = time.monotonic()
    if context.workers.in_process:
        from cbtrain.model.loading import forget_base
        from cbtrain.training.loop import fill_teacher_cache

        try:
            with bar("Running the teacher", plan.rows) as advance:
                rows, teacher_s = fill_teacher_cache(context.config, plan.directory, advance)
        finally:
            forget_base()  # the trials' processes load their own
    else:
        from sweeps.execution.trial import fill_cache_on_workers

        with bar("Running the teacher", plan.bytes) as advance, _watching(plan.directory, advance):
            rows, teacher_s = fill_cache_on_workers(plan.directory, context)
    return CacheReport(rows, teacher_s, time.monotonic() - started, plan.rows_read_by_a_run)


@contextlib.contextmanager
def _watching(directory: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Tell of bytes that other processes add to a cache."""
    from cbtrain.teacher_cache.store import bytes_there

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
