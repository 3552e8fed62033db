"""Presets and validation."""

import subprocess
import sys

import pytest

from cbtrain.config import PRESETS, CircuitBreakerConfigLlama4Scout, InputError, get_config


def test_the_call_that_users_know_gives_their_settings():
    config = get_config("llama-4-scout", beta_kl=1.0, kl_temperature=2.0)
    assert (config.beta_kl, config.kl_temperature, config.alpha, config.target_layers) == (1.0, 2.0, 8.0, (12, 24, 36))


def test_attributes_of_a_preset_class_can_be_assigned():
    config = CircuitBreakerConfigLlama4Scout()
    config.beta_kl = 0.5
    assert config.beta_kl == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_starts_at_the_same_kl(name):
    config = get_config(name)
    config.validate()
    assert (config.beta_kl, config.kl_temperature) == (0.3, 1.0)


def test_underscores_in_a_preset_are_hyphens():
    assert type(get_config("llama_4_scout")) is CircuitBreakerConfigLlama4Scout


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match=r"did you mean llama-3\.1-8b-instruct\?"):
        get_config("lama-3.1-8b-instruct")


def test_assigning_an_unknown_field_is_an_error_with_the_nearest():
    with pytest.raises(InputError, match="did you mean beta_kl"):
        get_config("tiny").beta_k = 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_kl", -0.1),
        ("beta_kl", float("nan")),
        ("kl_temperature", 0.0),
        ("steps", 0),
        ("target_layers", ()),
        ("target_layers", (0,)),
        ("eval_fraction", 1.0),
        ("warmup_steps", 71),
        ("micro_batch_size", 5),
        ("model", ""),
        ("steps", "10"),
        ("steps", True),
        ("lr", "fast"),
        ("mask_policy", "completion"),
        ("lr_schedule", "cosine"),
        ("coefficient_schedule", "cosin"),
        ("dtype", "float16"),
        ("zero_stage", 4),
        ("harmful", "harmful.jsonl"),
        ("target_layers", ("1",)),
        ("lora_layers", 3),
    ],
)
def test_a_bad_value_is_refused_when_used_and_named_by_its_flag(field, value):
    config = get_config("tiny", **{field: value})
    with pytest.raises(InputError, match="--" + field.replace("_", "-")):
        config.validate()


def test_an_assigned_list_serves_as_the_tuple_that_it_stands_for():
    config = get_config("tiny")
    config.harmful, config.target_layers, config.lr = ["a.jsonl"], [1, 2], 1
    config.validate()
    assert (config.harmful, config.target_layers) == (("a.jsonl",), (1, 2))


def test_configuration_needs_no_torch():
    code = "import cbtrain.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
