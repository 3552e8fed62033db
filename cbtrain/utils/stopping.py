"""Asking a run to stop: it writes a checkpoint and ends, and goes on from there when it is resumed."""

from collections.abc import Callable

Asked = Callable[[], bool]
"""Whether a run shall stop. Asked after each update and between held-out batches, on every rank."""


def never() -> bool:
    """For a run that nobody stops."""
    return False


class Interrupted(Exception):
    """A run was asked to stop, and its checkpoint holds all that it had done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped behind step {step}")
        self.step = step
        """Updates done."""
