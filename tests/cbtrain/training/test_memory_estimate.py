"""Predicted memory: what blocks keep is what autograd keeps, and each setting moves the term that it should."""

from dataclasses import replace

import pytest
import torch
from causal_models import SHAPE, model_of, with_large_weights
from transformers import AutoConfig, DbrxConfig, DbrxForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from cbtrain.config import CircuitBreakerConfig, get_config
from cbtrain.model.checks import prepare
from cbtrain.model.lora import add_adapter, decoder_blocks
from cbtrain.training.memory_estimate import Rows, _kept_by_token, predict, predict_run, structure

CONFIG = get_config("tiny", target_layers=(1, 2), lora_rank=4)
ROWS = Rows(2, 32, 40)


def kept_for_real(adapted) -> int:
    """Bytes that the second block keeps of 2 × 32 tokens, a row of which is padded."""
    weights = {p.untyped_storage()._cdata for p in adapted.parameters()}
    block, kept = decoder_blocks(adapted.get_base_model())[1][1], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if entered and storage._cdata not in weights:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    entered: list[int] = []
    block.register_forward_pre_hook(lambda *_: entered.append(1))
    block.register_forward_hook(lambda *_: entered.clear())
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[1, 20:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted.get_base_model().model(input_ids=torch.ones(2, 32, dtype=torch.int64), attention_mask=mask)
    return sum(size for _, size in kept.values())


def test_what_blocks_keep_is_predicted_without_weights():
    adapted = add_adapter(model_of("llama"), CONFIG)
    predicted = _kept_by_token(structure(CONFIG, adapted.get_base_model().config))[1] * 64
    assert kept_for_real(adapted) == pytest.approx(predicted, rel=0.1)


def test_latent_attention_keeps_values_of_another_width_than_its_queries():
    shape = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8}
    sizes = SHAPE | {"num_key_value_heads": 4, "first_k_dense_replace": 4}
    model = DeepseekV3Config(**sizes, **shape, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1)
    adapted = add_adapter(with_large_weights(DeepseekV3ForCausalLM(model)), CONFIG)
    assert kept_for_real(adapted) == pytest.approx(_kept_by_token(structure(CONFIG, model))[1] * 64, rel=0.15)


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_the_adapter_that_is_predicted_is_the_one_that_is_trained(name):
    """On linear maps of a family's own classes too."""
    base = model_of(name)
    predicted = predict(CONFIG, structure(CONFIG, base.config), ROWS, ROWS, ROWS).adapter
    assert predicted == 4 * sum(p.numel() for p in add_adapter(base, CONFIG).parameters() if p.requires_grad)


def test_a_model_that_cannot_be_traced_without_weights_is_told_in_words(small_config, tmp_path):
    shape = {"hidden_size": 32, "ffn_hidden_size": 48}
    base = DbrxForCausalLM(
        DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=3,
            max_seq_len=512,
            vocab_size=256,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={**shape, "moe_num_experts": 2},
        )
    )
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^the model cannot be traced without its weights \(NotImplementedError: "):
        predict_run(replace(small_config, model=str(tmp_path)), prepare(small_config)[0])


def test_every_setting_moves_the_term_that_it_should():
    model = model_of("llama").config

    def predicted(world_size: int = 1, **fields: object):
        config = replace(CONFIG, **fields)
        return predict(config, structure(config, model), ROWS, ROWS, ROWS, world_size=world_size)

    plain = predicted()
    assert predicted(gradient_checkpointing=True).activations < plain.activations
    assert predicted(hidden_states="output_hidden_states").activations > plain.activations
    assert predicted(dtype="bf16").weights * 2 == plain.weights
    assert predicted(zero_stage=0, world_size=4).optimizer == plain.optimizer
    assert predicted(zero_stage=1, world_size=4).optimizer * 4 == plain.optimizer
    assert predicted(lora_rank=8).adapter == 2 * plain.adapter
    assert plain.peak > plain.standing


def test_a_run_is_predicted_by_its_longest_rows(small_config: CircuitBreakerConfig):
    data, _ = prepare(small_config)
    train = [sorted(side.train, key=lambda row: len(row.input_ids)) for side in (data.harmful, data.benign)]
    whole = predict_run(small_config, data)
    shorter = replace(data, harmful=replace(data.harmful, train=train[0][:8]))
    assert predict_run(small_config, shorter).activations <= whole.activations
    by_hand = [Rows(8, len(rows[-1].input_ids), sum(sorted(row.scored_tokens for row in rows)[-8:])) for rows in train]
    adapted = structure(small_config, AutoConfig.from_pretrained(small_config.model))
    expected = predict(small_config, adapted, *by_hand, by_hand[1])
    assert (whole.activations, whole.teacher, whole.head) == (expected.activations, expected.teacher, expected.head)
    halved = predict_run(small_config, data, world_size=2)
    assert halved.activations < whole.activations
