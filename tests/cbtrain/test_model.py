"""Two views of one copy of weights, and the hidden states that the losses read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from cbtrain.config import InputError, get_config
from cbtrain.data import TokenBatch
from cbtrain.loop import prepare
from cbtrain.model import add_adapter, check_fit, check_layers, forward, load_base, teacher_view


@pytest.fixture
def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(7, 100, (3, 9), generator=generator)
    attention_mask = torch.ones(3, 9, dtype=torch.int64)
    attention_mask[1, 6:] = 0
    return TokenBatch(input_ids=input_ids, attention_mask=attention_mask, loss_mask=attention_mask.bool())


@pytest.fixture
def adapted(small_config):
    config = replace(small_config, lora_init_std=0.1)
    model = add_adapter(load_base(config), config)
    yield model
    model.unload()


def test_hooks_and_the_models_own_hidden_states_are_identical(adapted, batch):
    layers = [0, 1, 2, 3]
    hooks = forward(adapted, batch, layers, logits=True, via="hooks")
    own = forward(adapted, batch, layers, logits=True, via="output_hidden_states")
    for layer, ours, theirs in zip(layers, hooks.hidden, own.hidden, strict=True):
        assert torch.equal(ours, theirs), f"hidden state {layer}"
    assert torch.equal(hooks.logits, own.logits)


def test_a_forward_without_logits_gives_the_same_hidden_states(adapted, batch):
    with_head = forward(adapted, batch, [1, 3], logits=True)
    without = forward(adapted, batch, [1, 3], logits=False)
    assert without.head is None
    assert all(torch.equal(a, b) for a, b in zip(with_head.hidden, without.hidden, strict=True))


def test_the_teacher_view_is_the_base_model(small_config, adapted, batch):
    base = LlamaForCausalLM.from_pretrained(small_config.model, dtype=torch.float32)
    expected = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    with teacher_view(adapted):
        teacher = forward(adapted, batch, [1], logits=True)
    student = forward(adapted, batch, [1], logits=True)
    assert torch.equal(teacher.logits, expected)
    assert not teacher.logits.requires_grad
    assert (student.logits - expected).abs().max() > 1e-3


def test_only_the_adapter_trains_and_the_base_is_whole_again_afterwards(small_config):
    base = load_base(small_config)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = add_adapter(base, small_config)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    model.unload()
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapters_start_depends_on_the_seed_alone(small_config):
    def weights(seed: int) -> list[torch.Tensor]:
        torch.rand(3)  # whatever was drawn before
        model = add_adapter(load_base(small_config), replace(small_config, seed=seed))
        copies = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        model.unload()
        return copies

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_lora_layers_are_the_only_blocks_adapted(small_config):
    model = add_adapter(load_base(small_config), replace(small_config, lora_layers=(1,)))
    adapted_names = {name for name, p in model.named_parameters() if p.requires_grad}
    model.unload()
    assert adapted_names
    assert all(".layers.1." in name for name in adapted_names), adapted_names


def test_a_block_moves_only_the_hidden_states_above_it(small_config, batch):
    config = replace(small_config, lora_layers=(1,), lora_init_std=0.1)
    model = add_adapter(load_base(config), config)
    student = forward(model, batch, [1, 2], logits=False)
    with teacher_view(model):
        teacher = forward(model, batch, [1, 2], logits=False)
    model.unload()
    assert torch.equal(student.hidden[0], teacher.hidden[0])
    assert not torch.equal(student.hidden[1], teacher.hidden[1])


def test_an_unknown_lora_target_is_named_with_the_known_ones_before_weights_are_read(small_config):
    with pytest.raises(InputError, match=r"--lora-targets c_attn.*q_proj"):
        check_fit(replace(small_config, lora_targets=("c_attn",)))
    assert check_fit(replace(small_config, lora_targets=("q_proj",))) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_layers": (4,)}, "--target-layers 4: the model has hidden states 0–3"),
        ({"lora_layers": (3,)}, "--lora-layers 3: the model has blocks 0–2"),
        (
            {"target_layers": (1, 3), "lora_layers": (1, 2)},
            "--target-layers 1: no LoRA layer below it (LoRA covers blocks 1–2), so it cannot move",
        ),
    ],
)
def test_layers_that_do_not_exist_or_cannot_move_are_refused(fields, message):
    with pytest.raises(InputError) as caught:
        check_layers(get_config("tiny", **fields), 3)
    assert str(caught.value) == message


def test_a_missing_model_directory_is_one_line(tmp_path):
    with pytest.raises(InputError) as caught:
        check_fit(get_config("tiny", model=str(tmp_path / "none")))
    assert "no such directory" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_is_one_line(tmp_path):
    with pytest.raises(InputError) as caught:
        check_fit(get_config("tiny", model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_decoder_whose_blocks_have_other_names_is_found(batch):
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    config = get_config("tiny", lora_init_std=0.1, lora_layers=(0, 1))
    adapted = add_adapter(GPTNeoXForCausalLM(shape).eval(), config)
    hooks = forward(adapted, batch, [1, 3], logits=True, via="hooks")
    own = forward(adapted, batch, [1, 3], logits=True, via="output_hidden_states")
    assert all(torch.equal(a, b) for a, b in zip(hooks.hidden, own.hidden, strict=True))


def test_the_last_hidden_state_comes_after_the_final_norm(batch):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = add_adapter(LlamaForCausalLM(shape).eval(), get_config("tiny"))
    last = forward(model, batch, [2], logits=False).hidden[0]
    norms = last.pow(2).mean(-1).sqrt()
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-2)


@pytest.fixture
def damaged(small_world, tmp_path):
    """A copy of the model directory to damage."""
    return Path(shutil.copytree(small_world, tmp_path / "damaged"))


def test_missing_weights_are_refused_and_not_made_up(small_config, damaged):
    weights = load_file(damaged / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights of the right shape for model\.layers\.1\..* \(9 in all\)"):
        load_base(replace(small_config, model=str(damaged)))


def test_a_weight_file_cut_short_is_refused_before_training(small_config, damaged):
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        check_fit(replace(small_config, model=str(damaged)))


def test_a_tokenizer_larger_than_the_model_is_refused(small_config, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(InputError, match="vocabulary ends at 49"):
        prepare(replace(small_config, model=str(damaged)))


def test_rows_longer_than_the_models_positions_are_refused(small_config, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    with pytest.raises(InputError, match="--max-length 256: the model has 20 positions"):
        prepare(replace(small_config, model=str(damaged)))
    prepare(replace(small_config, model=str(damaged), max_length=20))


def test_a_model_without_sdpa_trains_with_what_it_has(batch):
    shape = Gemma2Config(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    adapted = add_adapter(Gemma2ForCausalLM(shape).eval(), get_config("tiny", lora_init_std=0.1))
    hooks = forward(adapted, batch, [1, 2], logits=True, via="hooks")
    own = forward(adapted, batch, [1, 2], logits=True, via="output_hidden_states")
    assert all(torch.equal(a, b) for a, b in zip(hooks.hidden, own.hidden, strict=True))
    assert hooks.logits.abs().max() <= shape.final_logit_softcapping
