"""Small models of random weights, and configurations on the small world of `conftest.py`."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cbtrain.config import CircuitBreakerConfig, get_config

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
