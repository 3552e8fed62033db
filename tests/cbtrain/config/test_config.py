"""Presets and validation."""

import dataclasses
import subprocess
import sys

import pytest

from cbtrain.config import PRESETS, CircuitBreakerConfigLlama4Scout, InputError, get_config
from cbtrain.config.validation import from_json


def test_the_call_that_users_know_gives_their_settings():
    config = get_config("llama-4-scout", beta_kl=1.0, kl_temperature=2.0)
    assert (config.beta_kl, config.kl_temperature, config.alpha, config.target_layers) == (1.0, 2.0, 8.0, (12, 24, 36))


def test_attributes_of_a_preset_class_can_be_assigned():
    config = CircuitBreakerConfigLlama4Scout()
    config.beta_kl = 0.5
    assert config.beta_kl == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_starts_at_the_same_kl(name):
    config = get_config(name, **({"model": "some/model"} if name == "auto" else {}))
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
        ("warmup_steps", 81),
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
    code = "import cbtrain.config, cbtrain.config.__main__, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_command_line_is_parsed_without_pydantic_which_takes_long_to_import():
    code = "import sys; from cbtrain.config import cli; from sweeps.settings import SweepSettings; "
    code += "cli.parse(SweepSettings, ['--steps', '3'], 'x', derived=None); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "--steps 0: must be more than 0"),
        ("warmup_steps", -1, "--warmup-steps -1: must be 0 or more"),
        ("gradient_accumulation", 0, "--gradient-accumulation 0: must be 1 or more"),
        ("gradient_accumulation", "2", "--gradient-accumulation 2: must be a whole number or None"),
        ("alpha", float("inf"), "--alpha inf: must be a finite number"),
        ("alpha", -1, "--alpha -1: must be more than 0"),
        ("lora_dropout", 1, "--lora-dropout 1: must lie in [0, 1)"),
        ("seed", 2**63, f"--seed {2**63}: must be 0 or more, and below 2^63"),
        ("lora_targets", 3, "--lora-targets 3: must be a list, each a text or all-linear"),
        ("cpu_offload", 1, "--cpu-offload 1: must be true or false"),
        ("zero_stage", 4, "--zero-stage 4: must be 0 or 1 or 2 or 3"),
    ],
)
@pytest.mark.parametrize("preset", ["tiny", "mistral-7b-instruct"])
def test_a_bad_value_is_one_line_that_says_what_it_must_be(preset, field, value, said):
    with pytest.raises(InputError) as refused:
        get_config(preset, **{field: value}).validate()
    assert str(refused.value) == said


@dataclasses.dataclass
class Inner:
    share: float = 0.5


@dataclasses.dataclass
class Shape:
    inner: Inner
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


def test_a_json_text_becomes_a_dataclass_with_defaults_and_without_keys_that_it_does_not_know():
    assert from_json('{"inner": {"share": 1, "of": "another version"}, "more": 3}', Shape) == Shape(Inner(1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"inner": ', "not JSON (EOF while parsing a value at line 1 column 10)"),
        (b"\xff", "not JSON (expected value at line 1 column 1)"),
        ("[1]", "no inner in it"),
        ("{}", "no inner in it"),
        ('{"inner": 3}', "no inner in it"),
        ('{"inner": {"share": "1"}}', "inner.share should be a valid number"),
        ('{"inner": {}, "counts": {"a": 1.5}}', "counts.a should be a valid integer"),
    ],
)
def test_a_json_text_of_another_shape_is_one_line(text, said):
    with pytest.raises(InputError) as refused:
        from_json(text, Shape)
    assert str(refused.value) == said


def test_the_published_numbers_are_the_presets():
    method = {
        "alpha": 10.0,
        "target_layers": (10, 20),
        "lora_layers": tuple(range(21)),
        "lora_rank": 16,
        "lora_targets": "all-linear",
        "steps": 150,
        "batch_size": 16,
        "lr": 1e-4,
        "lr_schedule": "constant",
        "warmup_steps": 0,
    }
    scout = {"alpha": 8.0, "steps": 300, "warmup_steps": 30, "lr": 2e-5, "target_layers": (12, 24, 36)}
    published = {
        "llama-3-8b-instruct": method,
        "llama-3.1-8b-instruct": method,
        "mistral-7b-instruct": method | {"alpha": 5.0},
        "llama-4-scout": method | scout | {"lora_layers": tuple(range(36))},
    }
    assert {*published, "tiny", "auto", "qwen3-8b", "smollm2-135m-instruct"} == set(PRESETS)
    for name, numbers in published.items():
        config = get_config(name)
        assert {field: getattr(config, field) for field in numbers} == numbers, name


def config_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cbtrain.config", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_command_lists_every_preset_in_eighty_columns():
    done = config_command()
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = {line.split()[0]: line for line in reversed(done.stdout.splitlines()) if line.strip()}
    assert rows["llama-4-scout"].split() == ["llama-4-scout", *"8 12 24 36 0–35 300 30 2e-05".split()]
    assert set(PRESETS) <= set(rows)
    assert "untested at this size" in done.stdout


def test_the_command_lists_the_fields_of_a_preset_with_the_defaults_that_it_replaces():
    rows = {line.split()[0]: line.split()[1:] for line in config_command("mistral_7b_instruct").stdout.splitlines()}
    assert rows["alpha"] == ["5", "10"]
    assert rows["max_length"] == ["1024", "tokens"]
    assert {field.name for field in dataclasses.fields(get_config("tiny"))} <= set(rows)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("mistral-7b", "error: --preset mistral-7b: no such preset; did you mean mistral-7b-instruct?\n"),
        ("--steps", "error: --steps: give one preset, or nothing for a table of all\n"),
    ],
)
def test_the_command_refuses_what_is_no_preset_in_one_line(argument, said):
    done = config_command(argument)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_every_field_of_a_preset_can_be_overridden():
    for field in dataclasses.fields(get_config("qwen3-8b")):
        value = getattr(get_config("tiny"), field.name)
        assert getattr(get_config("qwen3-8b", **{field.name: value}), field.name) == value
