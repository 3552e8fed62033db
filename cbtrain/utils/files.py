"""Files written whole or not at all, told apart by their content, and a lock that dies with its holder."""

import fcntl
import functools
import hashlib
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_SCRATCH = re.compile(r".+\.[0-9a-f]{32}\.tmp")


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all, beside others that may write the same; its directory is made.

    Raises:
        OSError: nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with scratch.open("xb") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return when a file's content, or the names in a directory, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_checksum(path: Path) -> str:
    """`checksum`, read once for as long as the file stays as it is; empty for what is no file."""
    return _checksum(path, tuple(stamp(path))) if path.is_file() else ""


@functools.lru_cache(maxsize=256)
def _checksum(path: Path, _stamp: tuple[int, ...]) -> str:
    return checksum(path)


def stamp(path: Path) -> list[int]:
    """What changes when a file is written to, or another put in its place: size, and times in ns."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest of its parents that is there."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep other builders out of a cache directory: they wait here, and should `open` the cache when they are in.

    The lock goes with its process. Where the file system knows no locks, two builders do the same work twice.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            _remove_scratch_of_the_dead(directory)
        yield


def _remove_scratch_of_the_dead(directory: Path) -> None:
    for path in (*directory.glob("*.tmp"), *directory.glob("*/*.tmp")):
        if _SCRATCH.fullmatch(path.name):
            with suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by its writer while that lives
                path.unlink()


def shown(name: str) -> str:
    """A model or file by the name that means something elsewhere: a hub id whole, of a path its last part."""
    return Path(name).name if Path(name).exists() else name


def finite_or_none(value: Any) -> Any:
    """`value` as JSON can hold it: every number that is not finite as None, tuples as lists, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
