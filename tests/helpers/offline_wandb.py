"""What W&B's offline mode has written, read back: files in LevelDB's log format, of protocol buffers."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, PREAMBLE = struct.Struct("<IHB"), 2**15, 7
WHOLE, LAST = 1, 4


@dataclass
class OfflineRun:
    """One run."""

    name: str = ""
    group: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """A line a step, with W&B's own `_step`."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(directory: Path) -> dict[str, OfflineRun]:
    """The runs under `directory`/wandb, by name."""
    runs = [_read(path) for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"))]
    assert len({run.name for run in runs}) == len(runs), [run.name for run in runs]
    return {run.name: run for run in runs}


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run.name, run.group, run.project = record.run.display_name, record.run.run_group, record.run.project
            run.config |= _values(record.run.config.update)
        elif record.HasField("history"):
            run.history.append(_values(record.history.item))
        elif record.HasField("summary"):
            run.summary |= _values(record.summary.update)
        elif record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = PREAMBLE, b""
    while position + HEADER.size <= len(content):
        if BLOCK - position % BLOCK < HEADER.size:  # padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        parts += content[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
