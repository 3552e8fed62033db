"""Loading a model, and two views of one copy of its weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from causal_models import model_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from cbtrain.config import InputError, get_config
from cbtrain.model.checks import check_fit, check_layers, prepare
from cbtrain.model.loading import load_base
from cbtrain.model.lora import add_adapter, lora_targets, teacher_view


@pytest.fixture
def adapted(small_config):
    config = replace(small_config, lora_init_std=0.1)
    model = add_adapter(load_base(config), config)
    yield model
    model.unload()


def test_the_teacher_view_is_the_base_model(small_config, adapted):
    input_ids = torch.randint(7, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    base = LlamaForCausalLM.from_pretrained(small_config.model, dtype=torch.float32)
    expected = base(input_ids).logits
    with teacher_view(adapted):
        teacher = adapted(input_ids).logits
    assert torch.equal(teacher, expected)
    assert not teacher.requires_grad
    assert (adapted(input_ids).logits - expected).abs().max() > 1e-3


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


def test_a_router_of_experts_is_not_adapted():
    assert lora_targets(model_of("llama4"), get_config("tiny")) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


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


def test_a_pad_token_beyond_the_models_embeddings_trains_and_a_scored_one_is_refused_by_name(
    small_config, small_world, tmp_path
):
    shutil.copytree(small_world, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(small_world)
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    config = replace(small_config, model=str(tmp_path / "model"))
    _, pad = prepare(config)
    assert pad < vocabulary == tokenizer.pad_token_id
    row = {"prompt": "how ?", "completion": "take [PAD]"}
    with (tmp_path / "harmful.jsonl").open("w") as file:
        file.writelines(json.dumps(row | {"prompt": f"how {i} ?"}) + "\n" for i in range(3))
    with pytest.raises(InputError, match=r"gives token id \d+ \(\[PAD\]\) in .*harmful\.jsonl:\d"):
        prepare(replace(config, harmful=(str(tmp_path / "harmful.jsonl"),)))
