"""Completions are those of plain forwards, in whichever way a family can generate."""

import pytest
import torch
from causal_models import SHAPE, model_of, with_large_weights
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from cbtrain.evaluation import generation
from cbtrain.evaluation.generation import complete
from cbtrain.utils.environment import say_once

PROMPTS = [(1, 9, 8, 7, 31, 44, 12), (1, 17, 5), (1, 60, 61, 62, 63)]
ONE_BY_ONE = "does not generate in padded batches: prompts are completed one by one\n"
NO_CACHE = "does not generate with a cache: each token of a completion runs the whole prompt again\n"


def counted_positions() -> PreTrainedModel:
    shape = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = BartConfig(**shape, vocab_size=100, max_position_embeddings=64, pad_token_id=0, is_encoder_decoder=False)
    return with_large_weights(BartForCausalLM(config))


def recurrent() -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "context_length": 64}
    return with_large_weights(RwkvForCausalLM(RwkvConfig(**shape, vocab_size=100, eos_token_id=2)))


def without_attention() -> PreTrainedModel:
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    return with_large_weights(BambaForCausalLM(BambaConfig(**SHAPE, **mamba, attn_layer_indices=[])))


def greedy(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """One token at a time, without padding or a cache."""
    said: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *said]])
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        said.append(token)
    return tuple(said)


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (lambda: model_of("llama"), ""),
        (lambda: model_of("gpt2"), ""),
        (lambda: model_of("falcon"), ""),
        (lambda: model_of("bamba"), ""),
        (counted_positions, f"BartForCausalLM {ONE_BY_ONE}"),
        (recurrent, f"RwkvForCausalLM {ONE_BY_ONE}"),
        (without_attention, f"BambaForCausalLM {NO_CACHE}"),
    ],
    ids=["llama", "gpt2", "falcon", "attention and mamba", "counted positions", "recurrent", "mamba alone"],
)
def test_completions_are_those_of_plain_forwards(make, lines, capsys):
    """Padding on the left, which some families take for text, and caches, which some lack, change nothing."""
    torch.manual_seed(0)
    model = make()
    say_once.cache_clear()
    found = complete(model, PROMPTS, max_new_tokens=5, batch_size=2, pad_token_id=0)
    assert found == [greedy(model, prompt, 5) for prompt in PROMPTS]
    assert capsys.readouterr().err == lines


def test_a_models_own_generation_settings_are_not_heeded():
    """Chat models are published with penalties that would judge another model than the one that was trained."""
    model = model_of("llama")
    plain = complete(model, PROMPTS, max_new_tokens=8, batch_size=3, pad_token_id=0)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.forced_eos_token_id = 2
    assert isinstance(model, LlamaForCausalLM)
    assert complete(model, PROMPTS, max_new_tokens=8, batch_size=3, pad_token_id=0) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_no_prompts_are_no_work():
    assert complete(model_of("llama"), [], max_new_tokens=8, batch_size=3, pad_token_id=0) == []


def test_each_prompt_is_counted_once():
    done: list[int] = []
    complete(counted_positions(), PROMPTS, max_new_tokens=2, batch_size=2, pad_token_id=0, progress=done.append)
    assert done == [1, 1, 1]
    assert len(PROMPTS[0]) > generation.TRIED_NEW
