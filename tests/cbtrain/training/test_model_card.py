"""The model card beside an adapter."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cbtrain.model.checks import prepare
from cbtrain.training.loop import train
from cbtrain.training.model_card import write_card


@pytest.fixture(scope="module")
def card_of():
    def read(config, directory: Path) -> ModelCard:
        train(config, directory, lambda _metrics: None)
        return ModelCard.load(directory / "adapter" / "README.md")

    return read


def test_a_trained_adapter_has_a_card_with_header_data_metrics_settings_and_limits(card_of, small_config, tmp_path):
    card = card_of(small_config, tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == Path(small_config.model).name
    data, _ = prepare(small_config)
    for side, file in (("harmful", small_config.harmful[0]), ("benign", small_config.benign[0])):
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        split = getattr(data, side)
        assert f"| {side} | {side}.jsonl | 32 | `{digest}` |" in card.text
        assert f"{side.title()}: {len(split.train)} train, {len(split.held_out)} held out" in card.text
    for said in ("(`eval_loss_reroute`) |", "| `kl_temperature` | 1.0 |", "| `target_layers` | 1, 2 |", "## Limits"):
        assert said in card.text, said


def test_the_card_names_no_place_on_this_machine(card_of, small_config, tmp_path):
    text = card_of(small_config, tmp_path).content
    for place in (tmp_path, Path(small_config.model).parent, Path.home(), Path.cwd()):
        assert str(place) not in text


def test_a_model_of_the_hub_keeps_its_whole_name(small_config, tmp_path):
    data, _ = prepare(small_config)
    small_config.model = "meta-llama/Llama-3.1-8B-Instruct"
    write_card(tmp_path, small_config, data, {"step": 4, "eval_benign_kl": 0.5})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert "(`eval_benign_kl`) | 0.5 |" in card.text
    assert "eval_loss_retain" not in card.text
