"""Held-out metrics."""

from dataclasses import replace

import pytest

from cbtrain.evaluate import evaluate, held_out
from cbtrain.loop import prepare
from cbtrain.model import add_adapter, load_base


def metrics_of(config) -> dict[str, float]:
    data, pad = prepare(config)
    model = add_adapter(load_base(config), config)
    try:
        return evaluate(model, held_out(data, config, pad), config)
    finally:
        model.unload()


def test_before_training_nothing_has_moved(small_config):
    metrics = metrics_of(replace(small_config, lora_init_std=0.0))
    assert metrics["eval_loss_reroute"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["eval_loss_retain"] == 0.0
    assert metrics["eval_benign_kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["eval_benign_top1_agreement"] == 1.0
    assert metrics["eval_benign_nll"] == pytest.approx(metrics["base_benign_nll"])
    assert metrics["eval_harmful_nll"] == pytest.approx(metrics["base_harmful_nll"])
    assert metrics["eval_cosine_positive_layer_1"] == 1.0


def test_metrics_do_not_depend_on_how_rows_are_batched(small_config):
    config = replace(small_config, lora_init_std=0.1)
    one, many = metrics_of(replace(config, eval_batch_size=1)), metrics_of(replace(config, eval_batch_size=7))
    assert one.keys() == many.keys()
    for name in one:
        assert one[name] == pytest.approx(many[name], rel=1e-4, abs=1e-6), name


def test_a_moved_student_has_positive_drift(small_config):
    metrics = metrics_of(replace(small_config, lora_init_std=0.1))
    assert metrics["eval_benign_kl"] > 1e-3
    assert 0 < metrics["eval_loss_reroute"] < 1
    assert metrics["eval_loss_retain"] > 0
