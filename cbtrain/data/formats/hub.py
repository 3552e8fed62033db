"""Names as files: a directory or a pattern is the data files in it; `org/name` or `org/name:split`, a data set of the
Hugging Face hub, becomes a Parquet file in the cache.

A file is what all else here knows: it has a checksum, and a run that continues reads the same rows.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.utils.errors import named, reason

_DATASET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>[\w.\[\]:%+-]+))?")
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
"""Of the files that are read of a directory, also with `.gz` behind them."""
_FILE_ENDINGS = (*SUFFIXES, ".gz", ".txt")


def is_dataset(name: str) -> bool:
    """Whether a name that is no file reads like a data set of the hub."""
    match = _DATASET.fullmatch(name)
    # A folder of that name stands here: the user means a file in it.
    return bool(match) and not name.lower().endswith(_FILE_ENDINGS) and not Path(name).parent.is_dir()


def localise(config: CircuitBreakerConfig) -> CircuitBreakerConfig:
    """The configuration with data sets of the hub replaced by their files on this machine, and directories and
    patterns by the files in them."""

    def local(name: str) -> str:
        return str(downloaded(name)) if is_dataset(name) and not Path(name).exists() else name

    return dataclasses.replace(
        config, harmful=expanded(tuple(map(local, config.harmful))), benign=expanded(tuple(map(local, config.benign)))
    )


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Files, with directories and patterns (`runs/*.json`) replaced by the data files in them, by name.

    Raises:
        InputError: a directory without a data file, or a pattern that none matches.
    """
    files: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p.relative_to(path)))
            if not inside:
                raise InputError(f"{name}: no data file in this directory ({', '.join(SUFFIXES)})")
            files += map(str, inside)
        elif any(character in name for character in "*?[") and not path.exists() and not is_dataset(name):
            matched = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not matched:
                raise InputError(f"{name}: no file matches")
            files += matched
        else:
            files.append(name)
    return tuple(files)


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def downloaded(name: str) -> Path:
    """The Parquet file of a data set, fetched unless the same revision's is here.

    Raises:
        InputError: the `datasets` package is missing, the data set cannot be had, or its split is not named.
    """
    match = _DATASET.fullmatch(name)
    assert match, name
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name}: no such file; to read it as a Hugging Face dataset, pip install datasets, or download its file "
            "and name that"
        ) from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(match["name"], split=match["split"])
    except Exception as error:  # whatever a missing network, a gated repository or an odd split makes the library raise
        reason = named(error)[:200]
        raise InputError(
            f"{name}: no such file, and no dataset to be had from the Hugging Face hub ({reason}); download its file "
            "and name that"
        ) from None
    return write_split(name, loaded)


def write_split(name: str, loaded: Any) -> Path:
    """Write a `datasets.Dataset`, or the one split that stands for a `DatasetDict`, to the cache; its file."""
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded))
        if split != "train" and len(loaded) > 1:
            raise InputError(f"{name}: has the splits {', '.join(loaded)}; name one, as {name}:{split}")
        loaded = loaded[split]
    root = user_cache_path("circuit-breaker-kl-sweep", appauthor=False) / "datasets"
    readable = re.sub(r"[^\w.-]+", "--", name)
    path = root / f"{readable}-{loaded._fingerprint}.parquet"
    if not path.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            loaded.to_parquet(str(scratch))
            scratch.replace(path)
        except OSError as error:
            raise InputError(f"{root}: {reason(error)}; set XDG_CACHE_HOME to a writable directory") from error
    return path
