"""Tokenised data of large files kept in the user's cache, so that the processes of a sweep render and tokenise it once.

Known by content: the files' checksums, the tokenizer's state and template, what the configuration says of data, and
this package's own code. What cannot be read or written is computed as if there were none.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from platformdirs import user_cache_path

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.loading import load_data
from cbtrain.data.tokenization import TokenRow
from cbtrain.utils.files import known_checksum, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORTH_BYTES = 2**20
"""Of the data files together; less is tokenised in a second."""
KEPT = 8
"""Files that stay in the cache, the latest."""


def cached_data(
    config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase", fields: Sequence[str]
) -> CircuitBreakerData:
    """`load_data`, or what an earlier call in any process made of the same.

    Args:
        fields: of the configuration, those that the data depends on.

    Raises:
        InputError: as `load_data`.
    """
    files = [Path(file) for file in (*config.harmful, *config.benign)]
    worth = sum(file.stat().st_size for file in files if file.is_file()) >= WORTH_BYTES
    if not worth or not tokenizer.is_fast:
        return load_data(config, tokenizer)
    directory = user_cache_path("circuit-breaker-kl-sweep", appauthor=False) / "tokens"
    path = directory / f"{_key(config, tokenizer, fields)}.npz"
    try:
        return _unpacked(path.read_bytes())
    except Exception:  # there is none, or whatever a damaged one raises
        data = load_data(config, tokenizer)
    try:
        write_whole(path, _packed(data))
        for old in sorted(directory.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        pass  # the next process does the work again
    return data


def _key(config: CircuitBreakerConfig, tokenizer: "PreTrainedTokenizerBase", fields: Sequence[str]) -> str:
    told = {
        "fields": {name: getattr(config, name) for name in fields},
        "files": [known_checksum(Path(file)) for file in (*config.harmful, *config.benign)],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "library": transformers.__version__,
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _code() -> str:
    """A checksum of all modules that make tokens of files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _packed(data: CircuitBreakerData) -> bytes:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    told: dict[str, Any] = {"mask_policy": data.mask_policy}
    for name in ("harmful", "benign"):
        side: SideData = getattr(data, name)
        told[name] = {"counts": dataclasses.asdict(side.counts), "remarks": side.remarks}
        for part in ("train", "held_out"):
            rows: list[TokenRow] = getattr(side, part)
            key = f"{name}_{part}"
            arrays[f"{key}_ids"] = np.fromiter((token for row in rows for token in row.input_ids), np.int64)
            arrays[f"{key}_scored"] = np.fromiter((scored for row in rows for scored in row.scored), np.bool_)
            arrays[f"{key}_lengths"] = np.array([len(row.input_ids) for row in rows], np.int64)
            told[name][part] = [(row.prompt, row.source) for row in rows]
    arrays["told"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpacked(content: bytes) -> CircuitBreakerData:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        told = json.loads(arrays["told"].tobytes())
        sides = {}
        for name in ("harmful", "benign"):
            parts = {}
            for part in ("train", "held_out"):
                key = f"{name}_{part}"
                ends = np.cumsum(arrays[f"{key}_lengths"])[:-1]
                ids = np.split(arrays[f"{key}_ids"], ends)
                scored = np.split(arrays[f"{key}_scored"], ends)
                parts[part] = [
                    TokenRow(tuple(i.tolist()), tuple(s.tolist()), prompt, source)
                    for i, s, (prompt, source) in zip(ids, scored, told[name][part], strict=True)
                ]
            counts = told[name]["counts"]
            counts["unread"] = {file: tuple(names) for file, names in counts["unread"].items()}
            counts["parts"] = {part: tuple(characters) for part, characters in counts["parts"].items()}
            sides[name] = SideData(**parts, counts=SideCounts(**counts), remarks=tuple(told[name]["remarks"]))
    return CircuitBreakerData(**sides, mask_policy=told["mask_policy"])
