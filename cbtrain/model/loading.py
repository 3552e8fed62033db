"""A Hugging Face model and its tokenizer, read from a directory or the hub and kept in the process for the next run."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.data.formats.hub import localise
from cbtrain.model import tiny
from cbtrain.model.attention import use_attention_in_float32
from cbtrain.utils.errors import named
from cbtrain.utils.files import stamp


def resolve(config: CircuitBreakerConfig) -> CircuitBreakerConfig:
    """The configuration with the embedded model and data, and data sets of the hub, replaced by their paths."""
    return localise(tiny.resolve(config) if config.model == "tiny" else config)


def hidden_size(config: CircuitBreakerConfig) -> int:
    """H, told by the model's structure."""
    return weightless_model(config).config.get_text_config().hidden_size


def load_tokenizer(config: CircuitBreakerConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.tokenizer`, or the one beside the model."""
    name = config.tokenizer or config.model
    with told_as_input_errors("tokenizer" if config.tokenizer else "model", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)


def load_structure(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """A model's configuration; without trust, transformers refuses one that needs code of its own, and asks nobody."""
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _stamps(name: str) -> tuple[tuple, ...]:
    """What changes when a model directory's files are replaced; nothing for a name of the hub."""
    if not Path(name).is_dir():
        return ()
    return tuple((path.name, *stamp(path)) for path in sorted(Path(name).iterdir()) if path.is_file())


def weightless_model(config: CircuitBreakerConfig) -> PreTrainedModel:
    """The model's modules with neither weights nor memory, built once for the same unchanged files."""
    return _weightless(config.model, config.trust_remote_code, _stamps(config.model))


@functools.lru_cache(maxsize=1)
def _weightless(name: str, trust: bool, _stamps: tuple) -> PreTrainedModel:
    structure = load_structure(name, trust)
    with torch.device("meta"):
        # In a dtype that experts can be traced in without weights.
        return AutoModelForCausalLM.from_config(structure, dtype=torch.bfloat16, trust_remote_code=trust)


@contextmanager
def told_as_input_errors(field: str, name: str) -> Iterator[None]:
    """Raise whatever goes wrong while a model's files are read as an `InputError` that names the flag."""
    place = Path(name)
    if place.is_file() or (name.startswith((".", "/", "~")) and not place.expanduser().is_dir()):
        raise InputError(f"--{field} {name}: no such directory; give one that save_pretrained wrote, or a hub id")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a broken file makes the libraries raise
        if field == "model" and place.is_dir() and not (place / "config.json").exists():
            raise InputError(f"--model {name}: {_without_config(place)}") from error
        if "trust_remote_code" in str(error):
            mend = "read it, then give --trust-remote-code, or give a model that transformers knows"
            raise InputError(f"--{field} {name}: needs Python code of its own, which would run here; {mend}") from error
        if "Couldn't instantiate the backend tokenizer" in str(error):
            raise InputError(f"--{field} {name}: holds no tokenizer; name one with --tokenizer") from error
        raise InputError(f"--{field} {name}: cannot be loaded from a directory or the hub ({named(error)})") from error


def _without_config(directory: Path) -> str:
    """What a directory without a model's config.json is, and what to give instead."""
    try:
        base = json.loads((directory / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except FileNotFoundError:
        return "no config.json there; give a directory that save_pretrained wrote, or a hub id"
    except (OSError, ValueError, KeyError, TypeError):
        base = "the one that it was trained on"
    return f"an adapter, not a model; give its base model, {base}"


@functools.lru_cache(maxsize=1)
def _load_base(name: str, dtype: str, trust: bool, _stamps: tuple) -> PreTrainedModel:
    use_attention_in_float32()
    model, report = AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, dtype), trust_remote_code=trust, output_loading_info=True
    )
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:  # the library would fill them with random numbers, others in each process
        first = f"{type(model).__name__} finds no weights of the right shape for {lacking[0]}"
        raise InputError(f"--model {name}: {first} ({len(lacking)} in all)")
    return model.requires_grad_(False).eval()


def load_base(config: CircuitBreakerConfig) -> PreTrainedModel:
    """The frozen base model, kept in the process for the next run of the same unchanged files and dtype.

    Whoever adapts it takes the adapter off again (`PeftModel.unload`) before the next call.
    """
    with told_as_input_errors("model", config.model):
        return _load_base(config.model, config.dtype, config.trust_remote_code, _stamps(config.model))


def forget_base() -> None:
    """Drop the base model kept in the process."""
    _load_base.cache_clear()
