"""The fingerprint of a model's weights: what a cache of their results must not outlive."""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from cbtrain.utils.files import checksum, stamp, write_whole

_CLOCK_GRAIN_S = 2
"""A file changed twice within this time may keep its time stamp."""


def weights_fingerprint(model_directory: Path, dtype: str, memo_directory: Path) -> str:
    """Changes with whatever changes the teacher: weights, configuration, dtype or library; not with where it lies.

    Args:
        memo_directory: where `weights.json` remembers checksums of unchanged files, as hashing takes a second a GB.

    Raises:
        OSError: a file cannot be read, or there are no weights.
    """
    weights = sorted(model_directory.glob("*.safetensors")) or sorted(model_directory.glob("*.bin"))
    if not weights:
        raise FileNotFoundError(f"{model_directory}: no weights (*.safetensors or *.bin)")
    # The library loads an adapter that lies beside the weights.
    described = [model_directory / "config.json", *model_directory.glob("*.index.json")]
    described += model_directory.glob("adapter_config.json")
    checksums = {path.name: checksum(path) for path in described} | _weight_checksums(
        weights, memo_directory / "weights.json"
    )
    parts: dict[str, object] = {"transformers": metadata.version("transformers"), "dtype": dtype, "files": checksums}
    if dtype == "bfloat16":
        parts["attention"] = "float32"  # `cbtrain.model.attention`: other states than the library's own
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _weight_checksums(files: Sequence[Path], memo: Path) -> dict[str, str]:
    """Checksums by name; `memo` keeps those of files that have not changed since."""
    before = _read_memo(memo)
    known, checksums = dict(before), {}
    for file in files:
        changes = json.dumps([str(file.resolve()), *stamp(file)])
        settled = time.time() - file.stat().st_mtime > _CLOCK_GRAIN_S
        checksums[file.name] = before.get(changes) or checksum(file)
        if settled:
            known[changes] = checksums[file.name]
    if known != before:
        with suppress(OSError):  # it saves time, no more
            write_whole(memo, json.dumps(known, indent=1))
    return checksums


def _read_memo(memo: Path) -> dict[str, str]:
    """The whole entries of the memo; none where it is damaged."""
    try:
        entries = json.loads(memo.read_bytes()).items()
    except (OSError, ValueError, AttributeError):
        return {}
    return {changes: digest for changes, digest in entries if re.fullmatch("[0-9a-f]{64}", str(digest))}
