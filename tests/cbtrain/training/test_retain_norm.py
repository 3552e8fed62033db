"""The retain loss in units of the teacher's norm: its formula, where the norms come from, and that they stay."""

import json
from dataclasses import replace

import pytest
import torch

from cbtrain.checkpoints.manifest import settings
from cbtrain.config import InputError
from cbtrain.losses import relative_retain_loss, retain_loss
from cbtrain.model.checks import check_layers, prepare, retained_layers
from cbtrain.model.loading import load_base
from cbtrain.training.loop import run_teacher, train


def ignored(_metrics: dict) -> None:
    pass


def norms_of(directory) -> tuple[float, ...]:
    return tuple(json.loads((directory / "config.json").read_text())["retain_norms"])


def by_hand(config) -> list[float]:
    """The mean norm of each retained layer over scored benign training tokens, one row at a time."""
    data, _ = prepare(config)
    base, found = load_base(config), []
    for row in data.benign.train:
        with torch.no_grad():
            states = base(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
        kept = torch.tensor(row.scored)
        layers = retained_layers(config, len(states) - 1)
        found.append(torch.stack([states[layer][0][kept].double().norm(dim=-1) for layer in layers], dim=1))
    return torch.cat(found).mean(0).tolist()


@pytest.fixture
def relative(small_config):
    return replace(small_config, steps=6, eval_every=3, lora_init_std=0.05, retain_norm="relative", retain_scale=3.0)


def test_it_is_the_distance_as_a_share_of_the_norm_times_the_scale():
    student, teacher = torch.randn(5, 2, 7, dtype=torch.float64), torch.randn(5, 2, 7, dtype=torch.float64)
    student.requires_grad_()
    distance = (student - teacher).norm(dim=-1)
    expected = (3 * distance[:, 0] / 50 + 3 * distance[:, 1] / 200).sum() / 10
    loss = relative_retain_loss(student, teacher, (50.0, 200.0), 3.0)
    assert torch.allclose(loss, expected, rtol=1e-12)
    grad, expected_grad = (torch.autograd.grad(each, student)[0] for each in (loss, expected))
    assert torch.allclose(grad, expected_grad, rtol=1e-12)
    assert relative_retain_loss(student, teacher, (50.0, 200.0), 3.0, 10).item() == pytest.approx(loss.item() / 2)


def test_at_the_norm_of_the_scale_it_is_the_published_loss():
    student, teacher = torch.randn(6, 3, 9), torch.randn(6, 3, 9)
    assert torch.allclose(relative_retain_loss(student, teacher, (10.0,) * 3, 10.0), retain_loss(student, teacher))


def test_hidden_states_of_another_scale_give_the_same_loss():
    student, teacher, norms = torch.randn(6, 2, 9), torch.randn(6, 2, 9), (4.0, 5.0)
    scaled = relative_retain_loss(30 * student, 30 * teacher, tuple(30 * norm for norm in norms), 10.0)
    assert torch.allclose(scaled, relative_retain_loss(student, teacher, norms, 10.0), rtol=1e-5)


@pytest.mark.parametrize("retain_layers", ["target", "through_target", "all"])
def test_norms_are_the_teachers_means_over_scored_benign_training_tokens(relative, tmp_path, retain_layers):
    config = replace(relative, retain_layers=retain_layers)
    live = train(config, tmp_path / "live", ignored)
    cached = train(config, tmp_path / "cached", ignored, teacher_cache=tmp_path / "cache")
    assert norms_of(tmp_path / "live") == pytest.approx(by_hand(config), rel=1e-5)
    assert norms_of(tmp_path / "cached") == pytest.approx(norms_of(tmp_path / "live"), rel=1e-5)
    assert cached["loss_retain"] == pytest.approx(live["loss_retain"], rel=1e-3)
    assert run_teacher(config, None).retain_norms == norms_of(tmp_path / "live")


def test_given_norms_are_taken_as_they_are(relative, tmp_path):
    config = replace(relative, retain_norms=(2.0, 4.0))
    train(config, tmp_path / "a", ignored)
    assert norms_of(tmp_path / "a") == (2.0, 4.0)


def test_a_resumed_run_keeps_the_norms_that_it_began_with(relative, tmp_path, monkeypatch):
    config = replace(relative, checkpoint_every=3)
    whole = train(config, tmp_path / "whole", ignored)

    class StopError(Exception):
        pass

    def stop(metrics: dict) -> None:
        if metrics["step"] == 5:
            raise StopError

    with pytest.raises(StopError):
        train(replace(config, log_every=1), tmp_path / "stopped", stop)
    monkeypatch.setattr("cbtrain.teacher_cache.retain_norms.token_norm", None)  # nothing is measured again
    resumed = train(replace(config, log_every=1), tmp_path / "stopped", ignored, resume=True)
    assert norms_of(tmp_path / "stopped") == norms_of(tmp_path / "whole")
    assert resumed["eval_loss_retain"] == whole["eval_loss_retain"]


def test_both_forms_are_logged_and_the_relative_one_has_no_unit(small_config, tmp_path):
    config = replace(small_config, steps=3, lora_init_std=0.05)
    metrics = train(config, tmp_path / "absolute", ignored)
    norms = [metrics[f"base_norm_layer_{layer}"] for layer in config.target_layers]
    low, high = metrics["eval_loss_retain"] / max(norms), metrics["eval_loss_retain"] / min(norms)
    assert 0 < low <= metrics["eval_loss_retain_relative"] <= high


def test_norms_that_do_not_fit_are_refused(relative):
    with pytest.raises(InputError, match=r"--retain-norms \(0.0, 1.0\): must be a number above 0"):
        replace(relative, retain_norms=(0.0, 1.0)).validate()
    with pytest.raises(InputError, match="--retain-norms: 3 numbers, and 2 layers are retained"):
        check_layers(replace(relative, retain_norms=(1.0, 1.0, 1.0)), 4)


def test_a_checkpoint_is_known_by_what_the_user_chose(relative):
    assert settings(replace(relative, retain_norms=(1.0, 2.0))) == settings(relative)
    assert settings(replace(relative, retain_scale=4.0)) != settings(relative)


def test_through_target_ends_at_the_highest_target(relative):
    config = replace(relative, target_layers=(1, 2), retain_layers="through_target")
    assert retained_layers(config, 4) == [0, 1, 2]
