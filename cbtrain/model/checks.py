"""Whether configuration, model and data fit together, told from the model's structure before its weights are loaded."""

import functools
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.data.batches import pad_token_id
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.token_cache import cached_data
from cbtrain.model.loading import load_tokenizer, told_as_input_errors, weightless_model
from cbtrain.model.lora import beyond_lora, lora_targets
from cbtrain.model.refusal import blocks_of, check_states, refused_by_name
from cbtrain.utils.environment import say_once


def check_rows(config: CircuitBreakerConfig, longest: int, largest_id: int, named: str = "") -> None:
    """Refuse rows that the model has no positions or embeddings for.

    Args:
        longest: tokens of the longest row.
        largest_id: the largest token id in any row.
        named: which token that is, and where it stands.
    """
    text = weightless_model(config).config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and 0 < positions < longest:  # below 0 where a family has no such limit
        raise InputError(f"--max-length {config.max_length}: the model has {positions} positions")
    if largest_id >= _vocabulary(config):
        raise InputError(
            f"--tokenizer {config.tokenizer or config.model}: gives token id {largest_id}{named}, the model's "
            f"vocabulary ends at {_vocabulary(config) - 1}; name the model's own tokenizer"
        )


def _vocabulary(config: CircuitBreakerConfig) -> int:
    """Token ids that the model has embeddings for."""
    return int(weightless_model(config).config.get_text_config().vocab_size)


def check_fit(config: CircuitBreakerConfig) -> int:
    """Check the layers and LoRA targets against the model's structure, without its weights.

    Returns:
        Number N of decoder blocks; hidden states are indexed 0 … N.

    What LoRA cannot reach in the blocks is said in a line.

    Raises:
        InputError: the model cannot be found, or a field names a layer or module that it does not have.
    """
    with told_as_input_errors("model", config.model):
        model = weightless_model(config)
        if quantised := getattr(model.config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
            raise InputError(
                f"--model {config.model}: is quantised ({method}); give its weights as float32 or bfloat16"
            )
        _check_weights(config.model)
    with refused_by_name(model):
        count = blocks_of(model)
        check_layers(config, count)
        lora_targets(model, config)
        _check_traced_states(model)
        if line := beyond_lora(model):
            say_once(line)
    return count


def _check_weights(name: str) -> None:
    """Look into the weights in a directory without reading them: a file may be missing, cut short, or a pickle that
    holds more than tensors."""
    place = Path(name)
    if not place.is_dir():
        return
    safe, pickled = sorted(place.glob("*.safetensors")), sorted(place.glob("pytorch_model*.bin"))
    if not safe and not pickled:
        raise InputError(f"--model {name}: no weights there; give a directory with its .safetensors")
    for file in safe:
        with safe_open(file, framework="pt"):
            pass  # reading the header tells a file that was cut short
    for file in () if safe else pickled:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # whatever a broken file makes the library raise
            raise InputError(f"--model {name}: {file.name} holds no plain weights; give .safetensors") from error


@functools.lru_cache(maxsize=1)
def _check_traced_states(model: PreTrainedModel) -> None:
    """`check_states` without weights; a model that cannot be traced so is tried when it has them."""
    try:
        with torch.device("meta"), torch.no_grad():
            ids, mask = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 1, 4, 4, dtype=torch.bool)
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
            }  # a mask as the library makes it reads the values of ours
            states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    except Exception:  # values of tensors were asked for, or another build's whatever
        return
    if states is not None:
        check_states(model, states, ids)


def check_layers(config: CircuitBreakerConfig, layers: int) -> None:
    """Refuse target layers and LoRA blocks that a model of `layers` decoder blocks does not have or cannot move.

    Raises:
        InputError: names the flag, the layer and what would do.
    """
    for block in config.lora_layers or ():
        if not 0 <= block < layers:
            raise InputError(f"--lora-layers {block}: the model has blocks 0–{layers - 1}")
    adapted = config.lora_layers or range(layers)
    for target in config.target_layers:
        if target > layers:
            raise InputError(f"--target-layers {target}: the model has hidden states 0–{layers}")
        if min(adapted) >= target:
            covered = f"LoRA covers blocks {min(adapted)}–{max(adapted)}"
            raise InputError(f"--target-layers {target}: no LoRA layer below it ({covered}), so it cannot move")
    retained = len(retained_layers(config, layers))
    if config.retain_norms is not None and len(config.retain_norms) != retained:
        mend = f"{retained} layers are retained; leave it out to have their norms measured"
        raise InputError(f"--retain-norms: {len(config.retain_norms)} numbers, and {mend}")


def retained_layers(config: CircuitBreakerConfig, blocks: int) -> list[int]:
    """Hidden states that the retain loss compares, of a model with so many decoder blocks."""
    if config.retain_layers == "target":
        return list(config.target_layers)
    return list(range((blocks if config.retain_layers == "all" else max(config.target_layers)) + 1))


DATA_FIELDS = (
    *("model", "tokenizer", "trust_remote_code", "harmful", "benign", "preference", "refusals_as_benign"),
    *("mask_policy", "max_length", "eval_fraction", "template_date", "thoughts"),
)


def prepare(config: CircuitBreakerConfig) -> tuple[CircuitBreakerData, int]:
    """Check the configuration against model and data without loading weights.

    Returns:
        The tokenised rows, read once in a process for the same unchanged files, and the padding token's id.
    """
    config.validate()
    check_fit(config)
    files = [Path(file) for file in (*config.harmful, *config.benign)]
    stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    return _tokenised(tuple(getattr(config, name) for name in DATA_FIELDS), stamps)


@functools.lru_cache(maxsize=1)
def _tokenised(fields: tuple, _stamps: tuple) -> tuple[CircuitBreakerData, int]:
    config = CircuitBreakerConfig(**dict(zip(DATA_FIELDS, fields, strict=True)))
    tokenizer = load_tokenizer(config)
    data = cached_data(config, tokenizer, DATA_FIELDS)
    rows = [row for side in (data.harmful, data.benign) for row in (*side.train, *side.held_out)]
    largest = max(rows, key=lambda row: max(row.input_ids))
    token = max(largest.input_ids)
    named = f" ({tokenizer.convert_ids_to_tokens(token)}) in {largest.source}"
    check_rows(config, max(len(row.input_ids) for row in rows), token, named)
    return data, pad_token_id(tokenizer, _vocabulary(config))
