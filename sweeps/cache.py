"""The teacher cache that all trials of a sweep read: where it lies, what it takes, filled before the first trial."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cbtrain.config import CircuitBreakerConfig

if TYPE_CHECKING:
    from sweeps.trial import TrialContext

AUTO, OFF = "auto", "off"
LIVE = "every step runs the teacher"


@dataclass(frozen=True)
class CachePlan:
    """Whether a sweep has a cache."""

    directory: Path | None
    """None: there is none."""
    says: str
    """What it takes, or why there is none."""
    rows: int = 0
    bytes: int = 0
    rows_read_by_a_trial: int = 0


@dataclass(frozen=True)
class CacheReport:
    """What it took to fill a cache, and what a trial reads from it."""

    rows_computed: int
    teacher_s: float
    """Of which the teacher ran."""
    wall_s: float
    """For loading the model and writing the shards as well."""
    rows_read_by_a_trial: int


def plan_cache(setting: str, default: Path, config: CircuitBreakerConfig, trials: int) -> CachePlan:
    """What `--teacher-cache` comes to, for so many trials of a configuration."""
    if setting == OFF:
        return CachePlan(None, f"off, {LIVE}")
    from cbtrain.loop import prepare
    from cbtrain.model import check_fit
    from cbtrain.recall import in_units, prospect

    directory = default if setting == AUTO else Path(setting).absolute()
    data, _ = prepare(config)
    coming = prospect(config, data, check_fit(config), directory)
    held_out = len(data.harmful.held_out) + len(data.benign.held_out)
    evaluations = config.steps // config.eval_every + bool(config.steps % config.eval_every) if config.eval_every else 1
    read = 2 * config.steps * config.batch_size + evaluations * held_out
    size = f"teacher states of {len(coming.wanted):,} rows, {in_units(coming.bytes)}"
    if setting == AUTO and trials * read < len(coming.wanted):
        return CachePlan(None, f"off, {LIVE}: {size}, would be read less than once each")
    try:
        coming.require_room()
    except OSError as error:
        return CachePlan(None, f"off, {LIVE}: it {error.strerror}")
    says = f"{size} of {in_units(coming.free_bytes)} free"
    return CachePlan(directory, says, len(coming.wanted), coming.bytes, read)


def fill_cache(plan: CachePlan, context: "TrialContext") -> CacheReport:
    """Compute what a planned cache lacks, with a progress bar, on what a trial runs on.

    Raises:
        CacheUnavailableError: it cannot be read or written.
    """
    from sweeps.progress import bar

    assert plan.directory is not None
    started = time.monotonic()
    if context.workers.in_process:
        from cbtrain.loop import fill_teacher_cache
        from cbtrain.model import forget_base

        with bar("Running the teacher", plan.rows) as advance:
            rows, teacher_s = fill_teacher_cache(context.config, plan.directory, advance)
        forget_base()  # the trials' processes load their own
    else:
        from sweeps.trial import fill_cache_on_workers

        with bar("Running the teacher", plan.bytes) as advance, _watching(plan.directory, advance):
            rows, teacher_s = fill_cache_on_workers(plan.directory, context)
    return CacheReport(rows, teacher_s, time.monotonic() - started, plan.rows_read_by_a_trial)


@contextlib.contextmanager
def _watching(directory: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Tell of bytes that other processes add to a cache."""
    ended = threading.Event()

    def size() -> int:
        total = 0
        for path in directory.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def watch(before: int) -> None:
        while not ended.wait(0.5):
            now = size()
            advance(now - before)
            before = now

    thread = threading.Thread(target=watch, args=(size(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
