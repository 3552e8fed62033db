"""What a run is made from, told by content: checksums of the data, the weights and the tokenizer that it reads."""

import functools
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from cbtrain.config import CircuitBreakerConfig
from cbtrain.utils.files import known_checksum, stamp

WEIGHTS = ("config.json", "adapter_config.json", "*.index.json", "*.safetensors", "*.bin")
TOKENIZER = ("tokenizer*.json", "vocab.json", "special_tokens_map.json", "merges.txt", "*.jinja", "*.model")
"""Structure and weights, tokenizer and chat template; whatever else lies beside them changes no run."""
_SAMPLED_ABOVE = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def identities(config: CircuitBreakerConfig) -> dict[str, str]:
    """A checksum for each file that a run of this configuration reads, by its path.

    Files of more than 64 MB, which weights are, are told by their size and 64 samples: enough to know another model,
    and a second's work for any of them. A model of the hub is told by its revision.
    """
    files = {file: known_checksum(Path(file)) for file in (*config.harmful, *config.benign) if Path(file).exists()}
    code = ("*.py",) if config.trust_remote_code else ()
    for name in filter(None, (config.model, config.tokenizer)):
        if Path(name).is_dir():
            found = {file for pattern in (*WEIGHTS, *TOKENIZER, *code) for file in Path(name).glob(pattern)}
            files |= {str(file): sampled_checksum(file) for file in sorted(found)}
        else:
            files[name] = _revision(name)
    return files


def difference(before: Mapping[str, str], now: Mapping[str, str], config: CircuitBreakerConfig) -> str:
    """The first file that is not what it was, what it is to the run, and what became of it; empty where all are.

    Args:
        before: what `identities` told then.
        now: what it tells now, of `config`.
    """
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            became = "gone" if name not in now else "new" if name not in before else "changed"
            return f"{name} ({_what(name, config)}): {became}"
    return ""


def _what(name: str, config: CircuitBreakerConfig) -> str:
    """What a file is to a run."""
    if name in (*config.harmful, *config.benign):
        return "data"
    if name == config.tokenizer or any(fnmatch(Path(name).name, pattern) for pattern in TOKENIZER):
        return "chat template" if name.endswith(".jinja") else "tokenizer and chat template"
    return "model"


def sampled_checksum(file: Path) -> str:
    """The file's checksum, or where it is large that of its size and samples, the first and last bytes among them."""
    return known_checksum(file) if file.stat().st_size <= _SAMPLED_ABOVE else _sampled(file, tuple(stamp(file)))


@functools.lru_cache(maxsize=256)
def _sampled(file: Path, _stamp: tuple[int, ...]) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for index in range(_SAMPLES):
            stream.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return f"sampled {digest.hexdigest()}"


def _revision(name: str) -> str:
    """The commit of a hub model that this machine has, as its cache files it; empty for a repository without one."""
    from transformers.utils import cached_file

    try:
        return Path(cached_file(name, "config.json")).parent.name
    except OSError:
        return ""
