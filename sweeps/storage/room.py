"""Room on the disk of a run directory for what a sweep writes, looked at before it begins and before each trial."""

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.filesize import decimal

from cbtrain.config import CircuitBreakerConfig
from cbtrain.utils.files import nearest_existing

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or the size that a file may have is used up."""
RESERVE = 4 * 2**20
"""Bytes for journal, tables and logs."""
CHECKPOINTS = 3
"""Two of a trial are kept while the next is written."""
OPTIMIZER_BYTES = 12
"""A checkpoint holds of each trained weight a float32 copy and two moments, beside the weight itself."""


class NoRoomError(OSError):
    """The disk is full, or too full for the next trial; its text is a line, with the mend."""

    def __init__(self, run: Path, why: str) -> None:
        mend = f"make room, then python sweeps/kl_ablation.py --resume {run} goes on with all that had ended"
        super().__init__(errno.ENOSPC, f"{why}; {mend}", str(run))


@dataclass(frozen=True)
class TrialFiles:
    """Bytes that a trial writes."""

    adapter: int = 0
    checkpoint: int = 0

    @classmethod
    def of(cls, config: CircuitBreakerConfig) -> "TrialFiles":
        """Told by the model's structure; nothing where it cannot be."""
        import torch

        from cbtrain.model.loading import load_structure
        from cbtrain.training.memory_estimate import structure

        try:
            adapted = structure(config, load_structure(config.model, config.trust_remote_code))
        except Exception:  # a model that cannot be built without weights trains all the same
            return cls()
        trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        size = getattr(torch, config.dtype).itemsize
        return cls(trained * size, trained * (size + OPTIMIZER_BYTES))

    def needed(self, trials: int, at_a_time: int) -> int:
        """Bytes for so many trials, of which some run."""
        return RESERVE + trials * self.adapter + at_a_time * CHECKPOINTS * self.checkpoint


@dataclass(frozen=True)
class Room:
    """On the disk of one run directory, there or not."""

    run: Path
    shown: Path
    """The run directory's path as the user knows it."""
    files: TrialFiles

    def require(self, trials: int = 1, at_a_time: int = 1) -> None:
        """See that there is room for so many trials.

        Raises:
            NoRoomError: there is not.
        """
        free, needed = shutil.disk_usage(nearest_existing(self.run)).free, self.files.needed(trials, at_a_time)
        if free < needed:
            what = "the next trial writes" if trials == 1 else f"{trials} trials write"
            raise NoRoomError(self.shown, f"{decimal(free)} are free, and {what} up to {decimal(needed)}")

    def ran_out(self, why: str) -> NoReturn:
        """Raise what says that something could not be written."""
        raise NoRoomError(self.shown, why)
