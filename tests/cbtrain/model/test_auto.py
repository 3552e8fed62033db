"""`--preset auto`: what it derives from a model, says of it, and lets the user override."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from cbtrain.config import CircuitBreakerConfig, InputError, cli, get_config
from cbtrain.model.auto import derived, reasons, target_layers

ROOT = Path(__file__).parents[3]


@dataclass(kw_only=True)
class Settings:
    preset: str = "tiny"
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


def parse(*argv: str) -> Settings:
    return cli.parse(Settings, argv, "x", derived=derived)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with the structure of a small model of 12 blocks, without weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 100}
    LlamaConfig(num_hidden_layers=12, max_position_embeddings=512, **sizes).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(32, (10, 20)), (30, (9, 19)), (36, (11, 22)), (48, (15, 30)), (12, (4, 8)), (4, (1, 2)), (2, (1,)), (1, (1,))],
)
def test_targets_are_the_published_shares_of_the_depth(blocks, expected):
    assert target_layers(blocks) == expected


@pytest.mark.parametrize("name", ["TINY", "Tiny"])
def test_another_spelling_of_tiny_is_refused_too(model, name):
    with pytest.raises(InputError, match="its numbers are the embedded model's"):
        parse("--preset", name, "--model", str(model))


def test_another_spelling_of_auto_derives_too(model):
    settings = parse("--preset", "AUTO", "--model", str(model))
    assert (settings.preset, settings.config.target_layers) == ("auto", (4, 8))


def test_a_model_whose_blocks_have_no_number_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(InputError, match="a resnet names no num_hidden_layers"):
        parse("--model", str(tmp_path))


def test_positions_of_minus_one_are_no_limit(model):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": -1}))
    assert parse("--model", str(model)).config.max_length == 1024


def test_a_model_without_a_preset_gets_its_own_numbers(model):
    settings = parse("--model", str(model))
    assert settings.preset == "auto"
    config = settings.config
    assert (config.target_layers, config.lora_layers) == ((4, 8), tuple(range(8)))
    assert (config.retain_norm, config.retain_scale) == ("relative", 10.0)
    assert (config.steps, config.batch_size, config.max_length) == (150, 16, 512)
    config.validate()


def test_every_derived_number_is_said_and_what_is_given_is_not(model):
    config = parse("--model", str(model)).config
    said = reasons(config)
    for name in ("target layers 4 and 8: 10/32 and 20/32 of 12 blocks", "lora layers blocks 0–7", "max length 512"):
        assert any(line.startswith(name) for line in said), said
    derived_fields = [name for name, value in asdict(config).items() if value != getattr(get_config("auto"), name)]
    names = {name.replace("_", " ") for name in derived_fields} - {"model"}
    assert names <= {name for name in names if any(line.startswith(name) for line in said)}
    given = parse("--model", str(model), "--target-layers", "3", "--steps", "9").config
    assert not any(line.startswith(("target layers", "steps")) for line in reasons(given))
    assert (given.target_layers, given.steps) == ((3,), 9)


def test_other_names_for_the_depth_are_understood(tmp_path):
    GPT2Config(n_layer=24, n_embd=32, n_head=2, vocab_size=100, n_positions=128).save_pretrained(tmp_path)
    config = derived(str(tmp_path))
    assert (config.target_layers, config.max_length) == ((8, 15), 128)


def test_the_embedded_models_numbers_are_for_no_other(model):
    with pytest.raises(InputError, match="--preset tiny: its numbers are the embedded model's"):
        parse("--preset", "tiny", "--model", str(model))
    assert parse("--model", "tiny").preset == parse().preset == "tiny"


def test_it_needs_a_model(tmp_path):
    with pytest.raises(InputError, match="--preset auto: give the --model"):
        parse("--preset", "auto")
    with pytest.raises(InputError, match=r"--model .*no such directory"):
        parse("--model", str(tmp_path / "gone"))


def test_a_training_run_prints_what_was_derived_and_records_it(small_world, tmp_path):
    data = ["--harmful", str(small_world / "harmful.jsonl"), "--benign", str(small_world / "benign.jsonl")]
    recipe = ["--steps", "2", "--batch-size", "4", "--output-dir", str(tmp_path / "out"), "--dtype", "float32"]
    command = [sys.executable, "-m", "cbtrain.train", "--model", str(small_world), *data, *recipe]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "target layers" in done.stdout
    assert "retain norm relative" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["retain_norm"] == "relative"
    assert min(config["retain_norms"]) > 0
