"""Checkpoints that a killed run goes on from: the engine's own files behind a manifest with their checksums.

A checkpoint is written aside, flushed to the disk and renamed; only then is the manifest that names it put in the
place of the one before, whose checkpoint stays. So at every moment a whole one is there, and a newest one that was
damaged afterwards costs the steps since the one before. DeepSpeed's loader unpickles what it reads: it is given only
what was written by a run of the same settings, model, data and chat template, with the checksums it was written with.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cbtrain.checkpoints.manifest import (
    BEFORE,
    MANIFEST,
    NOTHING,
    CheckpointError,
    Manifest,
    Progress,
    TornError,
    digest,
    newest_whole,
    read,
    settings,
)
from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.model.identity import identities
from cbtrain.utils import distributed
from cbtrain.utils.errors import named
from cbtrain.utils.files import checksum, flush, write_whole


class Checkpoints:
    """The checkpoints of one run: the newest and the one before. All ranks call the same methods.

    Args:
        directory: theirs alone.
        data: what the run trains and measures on.
    """

    def __init__(self, directory: Path, config: CircuitBreakerConfig, data: CircuitBreakerData) -> None:
        self._directory, self._config, self._data = directory, config, data

    @functools.cached_property
    def _inputs(self) -> dict[str, str]:
        return identities(self._config)

    def begin(self) -> Progress:
        """Remove what an earlier run left; that nothing is done yet."""
        if distributed.rank() == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            if self._config.checkpoint_every:
                _ = self._inputs  # as they are now, should they change while it trains
        return NOTHING

    def load(self, engine) -> Progress:
        """Restore the newest whole checkpoint; where that is the one before, a line says why.

        Raises:
            CheckpointError: on every rank, where there is none, or it is of other settings, inputs or another number
                of workers, or the libraries cannot load it.
        """
        found = distributed.agreed(self._newest_whole() if distributed.rank() == 0 else None)
        if isinstance(found, CheckpointError):
            raise found
        assert found is not None
        failure = None
        try:
            engine.load_checkpoint(str(self._directory), tag=found.tag, load_module_strict=False)
            random_state = torch.load(self._random_state_file(found.tag), weights_only=True)
        except Exception as error:  # other versions of the libraries may fail in any way
            failure = CheckpointError(f"{self._directory}: cannot be loaded ({named(error)})")
        if distributed.any_rank(failure is not None):
            raise failure or CheckpointError(f"{self._directory}: another worker cannot load it")
        _set_random_state(random_state)
        return found.progress

    def _newest_whole(self) -> Manifest | CheckpointError:
        """What to go on from, left as the newest, with nothing beside it that no manifest names."""
        try:
            manifest, skipped = newest_whole(self._directory, self._config, distributed.world_size(), self._inputs)
            if manifest.rows != self._data.fingerprint:
                mend = "another version of this package or of its libraries reads the same files otherwise"
                raise CheckpointError(f"the rows' tokens are not those of {self._directory}: {mend}")
        except CheckpointError as error:
            return error
        except OSError as error:  # raised here alone, it would leave the other ranks waiting
            return CheckpointError(f"{self._directory}: {named(error)}")
        if skipped:
            said = f"checkpoint skipped: {skipped}; the run goes on from the one before, of step {manifest.step}"
            print(said, file=sys.stderr, flush=True)
            write_whole(self._directory / MANIFEST, (self._directory / BEFORE).read_bytes())
        self._keep_only_named()
        return manifest

    def save(self, engine, progress: Progress) -> None:
        """Write the adapter, the optimizer's state and each rank's random state after so many updates."""
        tag = f"step-{progress.step}"
        aside = self._directory / f"{tag}.tmp"
        if distributed.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        engine.save_checkpoint(str(self._directory), tag=aside.name, save_latest=False, exclude_frozen_parameters=True)
        # One file a rank: dropout draws differ between ranks.
        torch.save(_random_state(), self._random_state_file(aside.name))
        dist.barrier()
        for file in aside.iterdir():  # on every rank, since each node flushes what it wrote
            flush(file)
        dist.barrier()
        if distributed.rank() == 0:
            manifest = Manifest(
                tag=tag,
                step=progress.step,
                seconds=dict(progress.seconds),
                settings=settings(self._config),
                inputs=self._inputs,
                rows=self._data.fingerprint,
                workers=distributed.world_size(),
                retain_norms=progress.retain_norms,
                unmeasured=dict(progress.unmeasured) if progress.unmeasured else None,
                files={file.name: checksum(file) for file in sorted(aside.iterdir())},
            )
            flush(aside)
            aside.rename(self._directory / tag)
            flush(self._directory)
            self._name(manifest)
            self._keep_only_named()
        dist.barrier()

    def _name(self, manifest: Manifest) -> None:
        """Make this the newest, and what was the newest the one before."""
        newest = self._directory / MANIFEST
        if newest.is_file():
            write_whole(self._directory / BEFORE, newest.read_bytes())
        record = dataclasses.asdict(manifest)
        write_whole(newest, json.dumps(record | {"sha256": digest(record)}, indent=1))
        flush(self._directory)

    def _keep_only_named(self) -> None:
        kept = {MANIFEST, BEFORE}
        for name in (MANIFEST, BEFORE):
            with contextlib.suppress(FileNotFoundError, TornError):  # it names nothing that could be loaded
                kept.add(read(self._directory / name).tag)
        for path in self._directory.iterdir():
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path)

    def _random_state_file(self, tag: str) -> Path:
        return self._directory / tag / f"random_state_{distributed.rank()}.pt"


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
