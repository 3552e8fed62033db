"""The size of a pretrained model's hidden states does not decide whether it is rerouted, nor by which recipe."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbtrain.calibration import ladder
from cbtrain.calibration.ladder import calibrate
from cbtrain.config import get_config
from cbtrain.model.loading import load_tokenizer, resolve
from tests.helpers.scaled_stream import scale_hidden_states


@pytest.fixture
def embedded(tmp_path):
    """Writes the embedded model with hidden states scaled; the configuration on it."""

    def write(scale):
        config = resolve(get_config("tiny"))
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        scale_hidden_states(model, scale)
        model.save_pretrained(tmp_path / f"{scale:g}")
        load_tokenizer(config).save_pretrained(tmp_path / f"{scale:g}")
        return replace(config, model=str(tmp_path / f"{scale:g}"))

    return write


@pytest.mark.parametrize("scale", [0.03, 30])
def test_a_scaled_model_says_the_same(embedded, scale):
    tokens = torch.arange(5, 65).view(2, 30)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(embedded(each).model)(tokens).logits for each in (1, scale)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_calibration_finds_one_recipe_at_hidden_norms_a_thousandfold_apart(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "SEEDS", 1)
    found = [calibrate(embedded(scale), tmp_path / "runs", max_steps=70) for scale in (0.03, 1.0, 30.0)]
    norms = [each.config.retain_norms[0] for each in found]
    assert norms[1] / norms[0] == pytest.approx(1 / 0.03, rel=1e-3)
    assert norms[2] / norms[1] == pytest.approx(30, rel=1e-3)
    assert [len(each.runs) for each in found] == [1, 1, 1]
    assert {tuple(each.settings.items()) for each in found} == {tuple(found[0].settings.items())}, found
    assert found[0].settings
    for each in found:
        assert each.runs[0].curve[-1]["eval_loss_reroute"] < 0.1  # ended as soon as it was level
