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

    id: str = ""
    name: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    group: str = ""
    project: str = ""
    entity: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """A line a step, with W&B's own `_step`."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(directory: Path) -> dict[str, OfflineRun]:
    """The runs under `directory`/wandb, by name; of one that was gone on with, each part is a run of its own."""
    runs = offline_parts(directory)
    assert len({run.name for run in runs}) == len(runs), [run.name for run in runs]
    return {run.name: run for run in runs}


def offline_parts(directory: Path) -> list[OfflineRun]:
    """What was written under `directory`/wandb at a time, oldest first."""
    return [_read(path) for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"))]


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run.name, run.group, run.project = record.run.display_name, record.run.run_group, record.run.project
            run.entity = record.run.entity
            run.id, run.job_type, run.tags = record.run.run_id, record.run.job_type, tuple(record.run.tags)
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
        if position + length > len(content):
            return  # still being written
        parts += content[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
