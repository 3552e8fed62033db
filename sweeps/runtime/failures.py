"""What went wrong: of what kind it is, and in which line it is told."""

import contextlib
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ray.exceptions import RayError, RayTaskError

from cbtrain.config import InputError
from cbtrain.utils.errors import FailedError, named
from sweeps.storage.room import NO_ROOM, NoRoomError

LOST = "its process was lost (killed, or out of memory)"
"""Why a trial failed of which nothing else is known."""
Failure = Literal["non_finite", "out_of_memory", "no_room", "lost", "raised"]
MEMORY_SIGNS = ("OutOfMemoryError", "can't allocate memory", "out of memory", "Out of memory", "(OOM)")
"""In the name or text of what PyTorch and Ray raise when memory runs out."""
ROOM_SIGNS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed",
    "unexpected pos",
)
"""In the text of what PyTorch and safetensors raise when a file cannot be written."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what lies below it in Ray's wrappings, to the bottom."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        yield error
        failures = getattr(error, "worker_failures", None)
        below = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
        error = below or error


def root_cause(error: BaseException) -> str:
    """One line for what went wrong at the bottom of Ray's wrappings."""
    return named([*causes(error)][-1])


def kind_of(error: BaseException) -> Failure:
    """What kind of failure an exception is, by all that caused it."""
    chain = [*causes(error)]
    told = " ".join(f"{type(each).__name__}: {each}" for each in chain)
    if any(type(each).__name__ == "NonFiniteLossError" for each in chain):
        return "non_finite"
    if any(isinstance(each, MemoryError) for each in chain) or any(sign in told for sign in MEMORY_SIGNS):
        return "out_of_memory"
    if any(isinstance(each, OSError) and each.errno in NO_ROOM for each in chain) or any(
        sign in told for sign in ROOM_SIGNS
    ):
        return "no_room"
    lost = any(isinstance(each, RayError) and not isinstance(each, RayTaskError) for each in chain)
    return "lost" if lost else "raised"


def _goes_on(shown: Path) -> str:
    return f"all that had ended is kept, and python sweeps/kl_ablation.py --resume {shown} goes on"


@contextlib.contextmanager
def afterwards(script: str, *words: str) -> Iterator[None]:
    """Have a shell run a script at the end of the body, or of this process, however it ends: killed, or by Ray, whose
    C++ ends the process when the node's own process is gone. The shell waits at the end of a pipe.

    Args:
        script: `$ended` in it is empty where it was the process that ended.
        words: `$1` and so on.
    """
    command = ["sh", "-c", f"read -r ended; {script}", "sh", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as shell:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # killed by whoever kills all
                shell.communicate(b"ended\n")


def last_words(shown: Path) -> contextlib.AbstractContextManager[None]:
    """Have a line printed where this process ends within the body without a word.

    Args:
        shown: the run directory's path as the user knows it.
    """
    why = f"the sweep's process was killed, or Ray's on this machine (logs in {shown}/logs)"
    return afterwards('test "$ended" || printf "%s\\n" "$1" >&2', f"error: {why}; {_goes_on(shown)}")


@contextlib.contextmanager
def told_in_a_line(run: Path, shown: Path, log: Path) -> Iterator[None]:
    """Whatever a library raises in the body ends the sweep in one line; its trace goes to the log.

    Args:
        shown: the run directory's path as the user knows it.

    Raises:
        FailedError: with what it was, and how to go on.
    """
    try:
        yield
    except (InputError, FailedError):
        raise
    except Exception as error:
        if kind_of(error) == "no_room" and not isinstance(error, NoRoomError):
            raise NoRoomError(shown, root_cause(error)) from error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # a file's, which says which
        with contextlib.suppress(OSError), (run / log).open("a") as file:
            traceback.print_exc(file=file)
        raise FailedError(f"{root_cause(error)} (trace in {shown / log}); {_goes_on(shown)}") from error
