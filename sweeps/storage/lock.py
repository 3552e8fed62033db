"""Locks on files that vanish with the process that holds them, however it ends."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

LEFT_RUNNING_S = 120
"""How long the processes of a killed sweep may take to end: Ray's need up to a minute."""
_POLL_S = 0.2


def this_process() -> str:
    """What names it to others, in a lock and in trials.csv: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"


class HeldError(RuntimeError):
    """Another process holds the lock; the text names it, as `host:pid`."""


@contextlib.contextmanager
def held(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for the body; children that this process starts do not.

    Where the file system knows no locks the body runs without.

    Args:
        wait_s: how long to wait for another holder.

    Raises:
        HeldError: it is still held after that time.
    """
    with path.open("a+") as file:
        deadline = time.monotonic() + wait_s
        while not _locked(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise HeldError(file.read().strip() or "another process")
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(this_process())
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    """Whether the lock could be had, or there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
