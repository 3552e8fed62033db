"""Where what libraries print goes while a trial, or other work of a sweep, runs in a process."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def output_to(run_dir: Path, name: str) -> Iterator[None]:
    """Send everything this process prints, libraries written in C included, to `logs/<name>.log` for the body."""
    path = run_dir / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig()  # warnings that are captured as log records come out with the rest
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with path.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            sys.stdout.flush()
            sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in kept:
            os.close(descriptor)


def print_trace() -> None:
    """Print the trace of the exception that is handled; a full disk must not hide what happened."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
