"""`--preset auto`: the method's numbers for a model that has none of its own, from the model's configuration.

Whatever is derived can be given as a flag instead. Nothing heavy is imported before a model is looked at.
"""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cbtrain.config import CircuitBreakerConfig, Dtype, InputError, get_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PUBLISHED_BLOCKS, PUBLISHED_TARGETS = 32, (10, 20)
"""Depth of the model that the method was published for, and its target layers."""
LARGE = 1_000_000_000
"""Parameters from which on activations are recomputed, as published for 8 billion."""


def derived(model: str, trust_remote_code: bool = False) -> CircuitBreakerConfig:
    """The preset `auto` for a model directory or id, or for `tiny`.

    Raises:
        InputError: its configuration cannot be read, or needs code of its own that is not trusted.
    """
    structure = _structure(model, trust_remote_code)
    targets = target_layers(structure.num_hidden_layers)
    config: CircuitBreakerConfig = replace(
        get_config("auto"),
        model=model,
        trust_remote_code=trust_remote_code,
        dtype=_dtype()[0],
        target_layers=targets,
        lora_layers=tuple(range(max(targets))),
        max_length=_length(structure)[0],
        gradient_checkpointing=_parameters(model, trust_remote_code) >= LARGE,
    )
    return config


def target_layers(blocks: int) -> tuple[int, ...]:
    """The published shares of the depth, 10/32 and 20/32, in a model of so many blocks; never the embedding."""
    return tuple(sorted({max(1, round(blocks * layer / PUBLISHED_BLOCKS)) for layer in PUBLISHED_TARGETS}))


def reasons(config: CircuitBreakerConfig) -> list[str]:
    """A line for each number of `config` that is as derived, saying why it is what it is."""
    expected = derived(config.model, config.trust_remote_code)
    structure = _structure(config.model, config.trust_remote_code)
    blocks, targets = structure.num_hidden_layers, expected.target_layers
    checkpointing = "on: as published for 8 billion" if expected.gradient_checkpointing else "off: the model is small"
    said = {
        "target_layers": f"{_words(targets)}: 10/32 and 20/32 of {blocks} blocks, as published",
        "lora_layers": f"blocks 0–{max(targets) - 1}: all below the highest target",
        "retain_norm": "relative: distances by the teacher's norms, so that no model's scale outweighs the rerouting",
        "retain_scale": f"{expected.retain_scale:g}: about the norm in the model that the method was published for",
        "dtype": f"{expected.dtype}: {_dtype()[1]}",
        "max_length": f"{expected.max_length} tokens: {_length(structure)[1]}",
        "steps": f"{expected.steps}, as published",
        "batch_size": f"{expected.batch_size} rows a side, as published",
        "lr": f"{expected.lr:g}, as published",
        "gradient_checkpointing": checkpointing,
    }
    return [
        f"{name.replace('_', ' ')} {line}"
        for name, line in said.items()
        if getattr(config, name) == getattr(expected, name)
    ]


def _structure(model: str, trust_remote_code: bool) -> "PretrainedConfig":
    from cbtrain.model import tiny
    from cbtrain.model.loading import load_structure, told_as_input_errors

    with told_as_input_errors("model", model):
        structure = load_structure(str(tiny.build()) if model == "tiny" else model, trust_remote_code).get_text_config()
    if not isinstance(getattr(structure, "num_hidden_layers", None), int):
        raise InputError(f"--model {model}: a {structure.model_type} names no num_hidden_layers: no decoder of blocks")
    return structure


def _parameters(model: str, trust_remote_code: bool) -> int:
    from cbtrain.model import tiny
    from cbtrain.model.loading import told_as_input_errors, weightless_model

    path = str(tiny.build()) if model == "tiny" else model
    with told_as_input_errors("model", model):
        config = CircuitBreakerConfig(model=path, trust_remote_code=trust_remote_code)
        return sum(weight.numel() for weight in weightless_model(config).parameters())


def _dtype() -> tuple[Dtype, str]:
    """The dtype for this machine's device, and why."""
    import torch

    if torch.cuda.is_available():
        return ("bfloat16", "the GPU has it") if torch.cuda.is_bf16_supported() else ("float32", "the GPU has no bf16")
    if os.environ.get("RAY_ADDRESS"):
        return "bfloat16", "published; the cluster's workers are taken to have it"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has it"
    return "float32", "this CPU has no bf16"


def _length(structure: "PretrainedConfig") -> tuple[int, str]:
    """Tokens a row at most, and why."""
    published = CircuitBreakerConfig().max_length
    positions = getattr(structure, "max_position_embeddings", None) or published
    bounded = 0 < positions < published  # some write −1 for no limit
    return (positions, "all positions that the model has") if bounded else (published, "as published")


def _words(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers))
