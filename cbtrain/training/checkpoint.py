"""Checkpoints that a killed run resumes from: the engine's own files behind a manifest with their checksums.

DeepSpeed's loader unpickles what it reads, so a checkpoint is loaded only if its manifest names this run's
configuration and every file still has the checksum it was written with. A new checkpoint is complete before the
manifest points to it, and the old one goes last.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.config.validation import from_json
from cbtrain.utils import distributed
from cbtrain.utils.errors import named
from cbtrain.utils.files import checksum, known_checksum, write_whole

MANIFEST = "manifest.json"


class CheckpointError(InputError):
    """There is no checkpoint that this run can go on from."""


class Progress(NamedTuple):
    """How far a checkpointed run had come."""

    step: int
    """Updates done."""
    seconds: Mapping[str, float]
    """What they had taken, by kind of work."""
    retain_norms: tuple[float, ...] | None = None
    """What the retain loss measured distances by."""


NOTHING = Progress(0, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Which checkpoint is the newest, of what run, and that it is whole. Defaults stand for what older ones lack."""

    tag: str
    """The checkpoint's directory."""
    step: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    config: str
    """The configuration's `fingerprint`."""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    """Checksums of the data files."""
    workers: int | None = None
    retain_norms: tuple[float, ...] | None = None
    files: dict[str, str]
    """Checksums of the checkpoint's files."""


def fingerprint(config: CircuitBreakerConfig) -> str:
    """Changes with every field that changes what is trained, but for norms, which follow from the others."""
    fields = dataclasses.asdict(config) | {"retain_norms": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def data_checksums(config: CircuitBreakerConfig) -> dict[str, str]:
    """Of each data file, by its name; whoever goes on must read the same rows."""
    return {name: known_checksum(Path(name)) for name in (*config.harmful, *config.benign)}


def save(engine, directory: Path, step: int, config: CircuitBreakerConfig, seconds: Mapping[str, float]) -> None:
    """Write the adapter, the optimizer's state and this rank's random state after `step` updates; all ranks call it.

    Args:
        seconds: what the updates took, by kind of work.
    """
    tag = f"step-{step}"
    # One file a rank: dropout draws differ between ranks.
    random_state = directory / tag / f"random_state_{distributed.rank()}.pt"
    engine.save_checkpoint(str(directory), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    torch.save(_random_state(), random_state)
    dist.barrier()
    if distributed.rank() == 0:
        manifest = Manifest(
            tag=tag,
            step=step,
            seconds=dict(seconds),
            config=fingerprint(config),
            data=data_checksums(config),
            workers=distributed.world_size(),
            retain_norms=config.retain_norms,
            files={p.name: checksum(p) for p in sorted((directory / tag).iterdir())},
        )
        write_whole(directory / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1))
        for old in directory.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old)
    dist.barrier()


def load(engine, directory: Path, config: CircuitBreakerConfig) -> Progress:
    """Restore the newest checkpoint; all ranks call it.

    Raises:
        CheckpointError: on every rank, where one of them finds none, or it is of another configuration or number of
            workers, or a file was changed since it was written.
    """
    failure: CheckpointError | None = None
    try:
        tag, progress = _checked(directory, config, distributed.world_size())
    except CheckpointError as error:
        failure = error
    if distributed.any_rank(failure is not None):
        raise failure or CheckpointError(f"{directory}: another worker cannot read it")
    try:
        engine.load_checkpoint(str(directory), tag=tag, load_module_strict=False)
        _set_random_state(torch.load(directory / tag / f"random_state_{distributed.rank()}.pt", weights_only=True))
    except Exception as error:  # other versions of the libraries may fail in any way
        raise CheckpointError(f"{directory}: cannot be loaded ({named(error)})") from error
    return progress


def step_of(directory: Path, config: CircuitBreakerConfig, workers: int) -> int:
    """The step from which a run of `workers` processes would go on; 0 where it would begin anew."""
    try:
        return _checked(directory, config, workers)[1].step
    except CheckpointError:
        return 0


def _checked(directory: Path, config: CircuitBreakerConfig, workers: int) -> tuple[str, Progress]:
    """The newest checkpoint's tag and progress, when it is this run's and whole.

    Raises:
        CheckpointError: it is not.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory}: no checkpoint to resume from (--checkpoint-every writes them)")
    try:
        manifest = from_json(path.read_bytes(), Manifest)
    except (OSError, InputError) as error:
        raise CheckpointError(f"{path}: damaged; remove {directory} to start anew") from error
    if manifest.config != fingerprint(config):
        raise CheckpointError(f"{path}: written by a run with other settings; start in another directory")
    for name, digest in data_checksums(config).items():
        if manifest.data.get(name, digest) != digest:
            raise CheckpointError(
                f"{name}: changed since {path} was written; put it back, or start in another directory"
            )
    if manifest.workers not in (None, workers):
        raise CheckpointError(f"{path}: written by {manifest.workers} workers, and this run has {workers}")
    for name, digest in manifest.files.items():
        file = directory / manifest.tag / name
        try:
            unchanged = checksum(file) == digest
        except OSError:
            unchanged = False
        if not unchanged:
            raise CheckpointError(f"{file}: missing or changed since it was written; remove {directory} to start anew")
    return manifest.tag, Progress(manifest.step, manifest.seconds, manifest.retain_norms)


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
