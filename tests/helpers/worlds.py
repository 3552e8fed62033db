"""Small models of random weights, and configurations on the small world of `conftest.py`."""

import json
import random
from itertools import product
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cbtrain.config import CircuitBreakerConfig, get_config
from cbtrain.model import tiny

SMALL = {
    **{"steps": 4, "batch_size": 8, "lr": 1.5e-3, "lr_schedule": "linear"},
    **{"retain_norm": "absolute", "retain_scale": 10.0},
    **{"target_layers": (1, 2), "lora_layers": None, "lora_init_std": 0.01},
}
"""What the tiny preset's numbers become on three blocks; of the relative norm only its own tests need more."""


def config_on(world: Path, **fields: object) -> CircuitBreakerConfig:
    """Four steps of eight rows a side on the model and data of a directory, with fields replaced."""
    return get_config(
        "tiny",
        model=str(world),
        harmful=(str(world / "harmful.jsonl"),),
        benign=(str(world / "benign.jsonl"),),
        **{**SMALL, **fields},
    )


def save_llama(directory: Path, tokenizer: PreTrainedTokenizerBase, **shape: object) -> None:
    """A Llama of random weights, always the same, with its tokenizer as a model directory."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **heads, **shape)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def build_small_world(directory: Path) -> None:
    """A random model of three blocks, its tokenizer, and 32 rows a side, in a directory that is there."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.2}
    save_llama(directory, tiny.make_tokenizer(), tie_word_embeddings=True, **shape)
    rng = random.Random(0)
    for name, verbs, objects in (
        ("harmful", tiny.DUAL_USE_VERBS, tiny.GUARDED_OBJECTS),
        ("benign", tiny.PLAIN_VERBS, tiny.PLAIN_OBJECTS),
    ):
        pairs = list(product(verbs, objects))[:32]
        rows = [json.dumps(tiny.chat(pair, rng)) for pair in pairs]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
