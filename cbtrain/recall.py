"""Whether a run recalls its teacher from a cache: what that takes, and the cache opened or built.

`prospect` tells from the model's structure and the tokens alone what a cache would hold. `open_or_build` gives a run
its cache, or says why it cannot have one, in which case every step runs the teacher.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers.utils import cached_file

from cbtrain import distributed
from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.data import CircuitBreakerData
from cbtrain.decoder import Decoder
from cbtrain.files import exclusive, nearest_existing
from cbtrain.model import check_fit, hidden_size, retained_layers
from cbtrain.teacher import TeacherCache, WantedStates, bytes_there, estimated_bytes, wanted_states
from cbtrain.weights import weights_identity

AUTO, OFF = "auto", "off"
LIVE = "every step runs the teacher"
HEADROOM = 1.05
"""Times the estimate: names, headers and what a file system adds."""
WORTH_READS = 2
"""Times that each row is read, on average, from where on a cache pays for its disk."""
Result = TypeVar("Result")


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
    coming = prospect(config, data, check_fit(config), directory)
    held_out = len(data.harmful.held_out) + len(data.benign.held_out)
    evaluations = -(-config.steps // config.eval_every) if config.eval_every else 1
    read = 2 * config.steps * config.batch_size + evaluations * held_out
    size = f"teacher states of {len(coming.wanted):,} rows, {in_units(coming.bytes)}"
    if setting == AUTO and runs * read < WORTH_READS * len(coming.wanted):
        return CachePlan(None, f"off, {LIVE}: {size}, would be read less than twice each")
    # What lies there already may be of other rows; `open_or_build` counts what is missing.
    try:
        coming.require_room(max(0, coming.bytes - bytes_there(directory)))
    except OSError as error:
        return CachePlan(None, f"off, {LIVE}: it {error.strerror}")
    says = f"{size} of {in_units(coming.free_bytes)} free"
    return CachePlan(directory, says, len(coming.wanted), coming.bytes, read)


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
class Prospect:
    """What a cache would hold, and where it would lie."""

    wanted: list[WantedStates]
    bytes: int
    free_bytes: int

    def require_room(self, missing_bytes: int) -> None:
        """Raise `OSError` where the disk is too small for what is not there yet."""
        if missing_bytes * HEADROOM > self.free_bytes:
            raise OSError(errno.ENOSPC, f"needs {in_units(missing_bytes)}, {in_units(self.free_bytes)} are free")


def prospect(config: CircuitBreakerConfig, data: CircuitBreakerData, blocks: int, directory: Path) -> Prospect:
    """The cache of a configuration in a directory, which need not exist; `blocks` is the model's number of them."""
    wanted = wanted_states(data, config.target_layers, retained_layers(config, blocks))
    size = estimated_bytes(wanted, hidden_size(config), config.dtype)
    return Prospect(wanted, size, shutil.disk_usage(nearest_existing(directory)).free)


def open_or_build(
    config: CircuitBreakerConfig,
    data: CircuitBreakerData,
    pad_token_id: int,
    decoder: Decoder,
    directory: Path,
    progress: Callable[[int], None] | None = None,
) -> TeacherCache:
    """This run's cache with every row in it; what is missing is computed. All ranks call it and share the work.

    Args:
        progress: called with the number of rows that were just done.

    Raises:
        CacheUnavailableError: on every rank, where it cannot be read or written on one of them.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    coming = prospect(config, data, decoder.layers, directory)
    try:
        with contextlib.ExitStack() as stack:
            if rank == 0:
                stack.enter_context(_building(directory))
            identity = _together(lambda: weights_identity(_model_directory(config.model), config.dtype, directory))
            cache = _together(lambda: TeacherCache(directory, identity))
            missing = cache.missing(coming.wanted)
            _require_agreement(missing)
            if missing:
                size = estimated_bytes(missing, hidden_size(config), config.dtype)
                _together(lambda: coming.require_room(size))
                _together(
                    lambda: cache.build(
                        coming.wanted,
                        lambda batch, *what: decoder.teacher(batch.to(distributed.device()), *what),
                        batch_size=config.eval_batch_size,
                        pad_token_id=pad_token_id,
                        progress=progress,
                        rank=rank,
                        world_size=world_size,
                    )
                )
                _together(cache.open)  # what the other ranks wrote
            _together(lambda: _require_all(cache, coming.wanted))
    except OSError as error:
        raise CacheUnavailableError(f"{directory}: {error.strerror or error}") from error
    return cache


@contextlib.contextmanager
def _building(directory: Path):
    """The lock, where the directory can be made at all; where not, the next step says so on every rank."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(exclusive(directory))
        yield


def _together(work: Callable[[], Result]) -> Result:
    """The result of `work`, done on every rank; where one fails, an `OSError` on all of them."""
    failure: OSError | None = None
    try:
        result = work()
    except OSError as error:
        failure = error
    failures = torch.tensor([float(failure is not None)], device=distributed.device())
    if distributed.reduce_sum(failures).item():
        raise failure or OSError("another worker could not read or write it")
    return result


def _require_agreement(missing: list[WantedStates]) -> None:
    """Raise `OSError` on every rank unless all miss the same rows, as they do who see the same directory.

    Ranks that did not would wait for each other in different collectives.
    """
    digest = hashlib.sha256("".join(sorted(each.key for each in missing)).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.float64, device=distributed.device())
    mean = distributed.reduce_sum(mine.clone()) / distributed.world_size()
    apart = distributed.reduce_sum((mean - mine).abs().sum())
    if apart.item() > 0:
        raise OSError("a run's workers must all see the same directory, and these do not")


def _require_all(cache: TeacherCache, wanted: list[WantedStates]) -> None:
    missing = cache.missing(wanted)
    if missing:
        raise OSError(f"{len(missing)} of {len(wanted)} rows are not seen after they were written")


def _model_directory(model: str) -> Path:
    """Where a model's files lie on this machine."""
    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def in_units(size: int) -> str:
    """Bytes as people read them."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
