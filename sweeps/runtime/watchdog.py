"""A process that makes no progress ends itself, whatever it hangs in."""

import contextlib
import faulthandler
from collections.abc import Callable, Iterator

NOTICED_S = 5.0
"""So much later than its trial notices: the trial says why."""
STDERR = 2


@contextlib.contextmanager
def ended_without_progress(seconds: float) -> Iterator[Callable[[], None]]:
    """End this process where nothing happens for so long in the body; 0 ends it never.

    What each of its threads does is printed then. A thread of C's sees to it: one that waits in a collective for a
    worker that is gone may hold Python's lock, and Ray would wait for it to end before it gives its CPUs to others.

    Yields:
        What is to be called whenever there is progress.
    """

    def progress() -> None:
        if seconds:
            faulthandler.dump_traceback_later(seconds + NOTICED_S, exit=True, file=STDERR)

    progress()
    try:
        yield progress
    finally:
        faulthandler.cancel_dump_traceback_later()
