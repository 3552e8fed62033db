"""Checkpoints that a killed run resumes from: the engine's own files behind a manifest with their checksums.

DeepSpeed's loader unpickles what it reads, so a checkpoint is loaded only if its manifest names this run's
configuration and every file still has the checksum it was written with. A new checkpoint is complete before the
manifest points to it, and the old one goes last.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from cbtrain import distributed
from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.files import checksum, write_whole

MANIFEST = "manifest.json"


def fingerprint(config: CircuitBreakerConfig) -> str:
    """Changes with every field that changes what is trained."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def save(engine, directory: Path, step: int, config: CircuitBreakerConfig) -> None:
    """Write the adapter, the optimizer's state and this rank's random state after `step` updates; all ranks call it."""
    tag = f"step-{step}"
    # One file a rank: dropout draws differ between ranks.
    random_state = directory / tag / f"random_state_{distributed.rank()}.pt"
    engine.save_checkpoint(str(directory), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    torch.save(_random_state(), random_state)
    dist.barrier()
    if distributed.rank() == 0:
        files = {p.name: checksum(p) for p in sorted((directory / tag).iterdir())}
        manifest = {"tag": tag, "step": step, "config": fingerprint(config), "files": files}
        write_whole(directory / MANIFEST, json.dumps(manifest, indent=1))
        for old in directory.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old)
    dist.barrier()


def load(engine, directory: Path, config: CircuitBreakerConfig) -> int:
    """Restore the newest checkpoint; the number of updates it had done.

    Raises:
        InputError: there is none, it is of another configuration, or a file was changed since it was written.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory}: no checkpoint to resume from (--checkpoint-every writes them)")
    try:
        manifest = json.loads(path.read_text())
        tag, step, written_by, files = (manifest[name] for name in ("tag", "step", "config", "files"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged; remove {directory} to start anew") from error
    if written_by != fingerprint(config):
        raise InputError(f"{path}: written by a run with other settings; start in another directory")
    for name, digest in files.items():
        file = directory / tag / name
        if not file.is_file() or checksum(file) != digest:
            raise InputError(f"{file}: missing or changed since it was written; remove {directory} to start anew")
    engine.load_checkpoint(str(directory), tag=tag, load_module_strict=False)
    _set_random_state(torch.load(directory / tag / f"random_state_{distributed.rank()}.pt", weights_only=True))
    return step


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
