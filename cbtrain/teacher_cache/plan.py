"""Whether runs keep their teacher's states in a cache: what that takes, told from structure and tokens alone."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.model.checks import check_fit, retained_layers
from cbtrain.model.loading import hidden_size
from cbtrain.teacher_cache.store import bytes_there
from cbtrain.teacher_cache.wanted_states import WantedStates, estimated_bytes, wanted_states
from cbtrain.utils.errors import reason
from cbtrain.utils.files import nearest_existing

AUTO, OFF = "auto", "off"


LIVE = "every step runs the teacher"


HEADROOM = 1.05
"""Times the estimate: names, headers and what a file system adds."""


WORTH_READS = 2
"""Times that each row is read, on average, from where on a cache pays for its disk."""


class CacheUnavailableError(RuntimeError):
    """There can be no cache; its text says why, in half a sentence. The live teacher serves as well, only slower."""


@dataclass(frozen=True)
class CachePlan:
    """What a `--teacher-cache` setting comes to."""

    directory: Path | None
    """None: there is no cache."""
    says: str
    """What it takes, or why there is none."""
    rows: int = 0
    bytes: int = 0
    rows_read_by_a_run: int = 0


def plan_cache(
    setting: str, default: Path, config: CircuitBreakerConfig, data: CircuitBreakerData, runs: int
) -> CachePlan:
    """Whether runs of a configuration have a cache, and where.

    Args:
        setting: `auto` for `default` where it fits and pays, `off`, or a directory.
        runs: how many runs will read it.

    Raises:
        InputError: no such directory can be.
    """
    if setting == OFF:
        return CachePlan(None, f"off, {LIVE}")
    directory = default if setting == AUTO else _usable(setting)
    estimate = estimate_cache(config, data, check_fit(config), directory)
    held_out = len(data.harmful.held_out) + len(data.benign.held_out)
    evaluations = -(-config.steps // config.eval_every) if config.eval_every else 1
    read = 2 * config.steps * config.batch_size + evaluations * held_out
    size = f"teacher states of {len(estimate.wanted):,} rows, {decimal(estimate.bytes)}"
    if setting == AUTO and runs * read < WORTH_READS * len(estimate.wanted):
        return CachePlan(None, f"off, {LIVE}: {size}, would be read less than twice each")
    # What lies there already may be of other rows; `open_or_build` counts what is missing.
    try:
        estimate.require_room(max(0, estimate.bytes - bytes_there(directory)))
    except OSError as error:
        return CachePlan(None, f"off, {LIVE}: it {reason(error)}")
    says = f"{size} of {decimal(estimate.free_bytes)} free"
    return CachePlan(directory, says, len(estimate.wanted), estimate.bytes, read)


def _usable(setting: str) -> Path:
    """A directory of the user's, which need not exist.

    Raises:
        InputError: it can be none, or cannot be written to.
    """
    if not setting:
        raise InputError(f"--teacher-cache: name a directory, or {AUTO} or {OFF}")
    directory = Path(setting).absolute()
    existing = nearest_existing(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--teacher-cache {setting}: {existing} is not a directory that can be written to")
    return directory


@dataclass(frozen=True)
class CacheEstimate:
    """What a cache would hold, and where it would lie."""

    wanted: list[WantedStates]
    bytes: int
    free_bytes: int

    def require_room(self, missing_bytes: int) -> None:
        """Raise `OSError` where the disk is too small for what is not there yet."""
        if missing_bytes * HEADROOM > self.free_bytes:
            raise OSError(errno.ENOSPC, f"needs {decimal(missing_bytes)}, {decimal(self.free_bytes)} are free")


def estimate_cache(
    config: CircuitBreakerConfig, data: CircuitBreakerData, blocks: int, directory: Path
) -> CacheEstimate:
    """The cache of a configuration in a directory, which need not exist; `blocks` is the model's number of them."""
    wanted = wanted_states(data, config.target_layers, retained_layers(config, blocks))
    size = estimated_bytes(wanted, hidden_size(config), config.dtype)
    return CacheEstimate(wanted, size, shutil.disk_usage(nearest_existing(directory)).free)
