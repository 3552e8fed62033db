"""The manifest of a checkpoint: of what run it is, and that it is whole; which checkpoint a run goes on from."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cbtrain.config import CircuitBreakerConfig, InputError, flag
from cbtrain.config.validation import from_json
from cbtrain.model.identity import difference, identities
from cbtrain.utils.files import checksum

MANIFEST = "manifest.json"
"""Names the newest checkpoint."""
BEFORE = "manifest_before.json"
"""Names the one before."""
SAME_MATHEMATICS = ("retain_norms", "micro_batch_size", "gradient_accumulation", "trust_remote_code")
"""Fields in which a run that goes on may differ: norms follow from the others, a smaller micro-batch with as many more
micro-steps gives the same updates but for rounding, and whether a model's code may run is said anew."""


class CheckpointError(InputError):
    """There is no checkpoint that this run can go on from."""


class TornError(CheckpointError):
    """A checkpoint is not what was written."""


class Progress(NamedTuple):
    """How far a checkpointed run had come."""

    step: int
    """Updates done."""
    seconds: Mapping[str, float]
    """What they had taken, by kind of work."""
    retain_norms: tuple[float, ...] | None = None
    """What the retain loss measured distances by."""
    unmeasured: Mapping[str, int | float] | None = None
    """Metrics of the last update, where it was to be evaluated and the run was stopped before that."""


NOTHING = Progress(0, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Which checkpoint it names, of what run, and that it is whole."""

    tag: str
    """The checkpoint's directory."""
    step: int
    seconds: dict[str, float]
    settings: dict[str, Any]
    """`settings` of the configuration."""
    inputs: dict[str, str]
    """`identities` of the configuration: model, tokenizer with chat template, data."""
    rows: str
    """`fingerprint` of the data: every token, and which are scored."""
    workers: int
    retain_norms: tuple[float, ...] | None
    files: dict[str, str]
    """Checksums of the checkpoint's files."""
    unmeasured: dict[str, int | float] | None = None
    """As in `Progress`."""

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.seconds, self.retain_norms, self.unmeasured)


def settings(config: CircuitBreakerConfig) -> dict[str, Any]:
    """What of a configuration a run that goes on must share, as JSON holds it."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in SAME_MATHEMATICS}
    return json.loads(json.dumps(fields))


def progress_of(directory: Path, config: CircuitBreakerConfig, workers: int) -> Progress:
    """What a run of `workers` processes would go on from; `NOTHING` where it would begin anew."""
    try:
        return newest_whole(directory, config, workers, identities(config))[0].progress
    except CheckpointError:
        return NOTHING


def newest_whole(
    directory: Path, config: CircuitBreakerConfig, workers: int, inputs: Mapping[str, str]
) -> tuple[Manifest, TornError | None]:
    """The newest whole checkpoint of this run, and what is wrong with a newer one.

    Raises:
        CheckpointError: there is none.
    """
    torn: TornError | None = None
    for name in (MANIFEST, BEFORE):
        path = directory / name
        try:
            manifest = read(path)
            _require_same_run(manifest, path, config, workers, inputs)
            _require_whole(manifest, directory)
        except FileNotFoundError:
            continue
        except TornError as error:
            torn = torn or error
            continue
        return manifest, torn
    if torn:
        raise CheckpointError(f"{torn}; remove {directory} to start anew")
    raise CheckpointError(f"{directory}: no checkpoint to resume from (--checkpoint-every writes them)")


def read(path: Path) -> Manifest:
    """What a manifest says.

    Raises:
        FileNotFoundError: there is none.
        TornError: it is not what was written.
    """
    try:
        text = path.read_bytes()
        record = from_json(text, dict[str, Any])
        if record.pop("sha256", None) != digest(record):
            raise InputError("its checksum is another")
        return from_json(text, Manifest)
    except FileNotFoundError:
        raise
    except (OSError, InputError) as error:
        raise TornError(f"{path}: damaged") from error


def digest(record: Mapping[str, Any]) -> str:
    """A checksum of what a manifest says."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _require_same_run(
    manifest: Manifest, path: Path, config: CircuitBreakerConfig, workers: int, inputs: Mapping[str, str]
) -> None:
    now = settings(config)
    for name in sorted({*now, *manifest.settings}):
        if manifest.settings.get(name) != now.get(name):
            other = f"{flag(name)} {manifest.settings.get(name)}, and this run has {now.get(name)}"
            raise CheckpointError(f"{path}: written by a run with {other}; start in another directory")
    if changed := difference(manifest.inputs, inputs, config):
        mend = "put it back as it was, or start in another directory"
        raise CheckpointError(f"{changed} since {path} was written; {mend}")
    if manifest.workers != workers:
        raise CheckpointError(f"{path}: written by {manifest.workers} workers, and this run has {workers}")


def _require_whole(manifest: Manifest, directory: Path) -> None:
    for name, written in manifest.files.items():
        file = directory / manifest.tag / name
        try:
            unchanged = checksum(file) == written
        except OSError:
            unchanged = False
        if not unchanged:
            raise TornError(f"{file}: missing or changed since it was written")
