"""Each term's gradient over the adapter, against autograd on the step's own loss."""

from dataclasses import replace

import pytest
import torch

from cbtrain.losses.schedule import coefficients
from cbtrain.model.checks import prepare
from cbtrain.model.loading import load_base
from cbtrain.model.lora import add_adapter
from cbtrain.training.gradient_norms import GradientNorms
from cbtrain.training.loop import train
from cbtrain.training.step import CircuitBreakerStep

NAMES = {"grad_norm_reroute", "grad_norm_retain", "grad_norm_kl", "grad_cosine_reroute"}


def measured(config, done: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The metrics, and the gradients of the whole loss and of its first term by one ordinary backward each."""
    data, pad = prepare(config)
    model = add_adapter(load_base(config), config)
    step, norms = CircuitBreakerStep(model, config), GradientNorms(data, config, pad)
    found = norms.measure(step, done)
    model.eval()
    weights, gradients = coefficients(config, done - 1), []
    for only_reroute in (False, True):
        model.zero_grad()
        losses = step.losses(norms._batch, norms._counts, weights)
        loss = weights.cs * losses[0]
        if not only_reroute:
            loss = loss + weights.cr * losses[1] + weights.kl_weight * losses[2]
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.cat([(p.grad if p.grad is not None else 0 * p).flatten() for p in trained]).detach())
    model.unload()
    return found, gradients


@pytest.mark.parametrize("beta_kl", [0.0, 0.7])
def test_norms_and_cosine_are_those_of_the_terms(small_config, beta_kl):
    config = replace(small_config, beta_kl=beta_kl, lora_init_std=0.1, lora_dropout=0.3)
    found, (whole, reroute) = measured(config, 3)
    assert found.keys() == NAMES
    against = whole - reroute
    assert found["grad_norm_reroute"] == pytest.approx(reroute.norm().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(reroute, against, dim=0).item()
    assert found["grad_cosine_reroute"] == pytest.approx(cosine, abs=1e-4)
    assert (found["grad_norm_kl"] > 0) == (beta_kl > 0)
    if beta_kl == 0:
        assert found["grad_norm_retain"] == pytest.approx(against.norm().item(), rel=1e-4)


def test_at_the_adapters_own_start_there_is_no_gradient_and_no_division_by_zero(small_config):
    config = replace(small_config, lora_init_std=0.0)
    data, pad = prepare(config)
    model = add_adapter(load_base(config), config)
    found = GradientNorms(data, config, pad).measure(CircuitBreakerStep(model, config), 1)
    model.unload()
    assert found["grad_cosine_reroute"] == pytest.approx(0.0, abs=1e-3)


def test_looking_changes_nothing_of_what_is_trained(small_config, tmp_path, monkeypatch):
    config = replace(small_config, steps=4, eval_every=1, lora_init_std=0.05, lora_dropout=0.2)
    looked = train(config, tmp_path / "a", lambda _metrics: None)
    monkeypatch.setattr(GradientNorms, "measure", lambda *_: {})
    blind = train(config, tmp_path / "b", lambda _metrics: None)
    assert {*looked} >= NAMES
    for name in ("loss", "grad_norm_total", "eval_loss_reroute", "eval_benign_kl"):
        assert looked[name] == blind[name], name
