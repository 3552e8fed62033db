"""A run's teacher cache, opened and, where rows are missing, built by all ranks together: `open_or_build`."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers.utils import cached_file

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.model.loading import hidden_size
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache.fingerprint import weights_fingerprint
from cbtrain.teacher_cache.plan import CacheUnavailableError, estimate_cache
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.teacher_cache.wanted_states import WantedStates, estimated_bytes
from cbtrain.utils import distributed
from cbtrain.utils.errors import reason
from cbtrain.utils.files import exclusive

Result = TypeVar("Result")


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
    estimate = estimate_cache(config, data, decoder.layers, directory)
    try:
        with contextlib.ExitStack() as stack:
            if rank == 0:
                stack.enter_context(_building(directory))
            fingerprint = _together(
                lambda: weights_fingerprint(_model_directory(config.model), config.dtype, directory)
            )
            cache = _together(lambda: TeacherCache(directory, fingerprint))
            missing = cache.missing(estimate.wanted)
            _require_agreement(missing)
            if missing:
                size = estimated_bytes(missing, hidden_size(config), config.dtype)
                _together(lambda: estimate.require_room(size))
                _together(
                    lambda: cache.build(
                        estimate.wanted,
                        lambda batch, *what: decoder.teacher(batch.to(distributed.device()), *what),
                        batch_size=config.eval_batch_size,
                        pad_token_id=pad_token_id,
                        progress=progress,
                        rank=rank,
                        world_size=world_size,
                    )
                )
                _together(cache.open)  # what the other ranks wrote
            _together(lambda: _require_all(cache, estimate.wanted))
    except OSError as error:
        raise CacheUnavailableError(f"{directory}: {reason(error)}") from error
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
    if distributed.any_rank(failure is not None):
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
