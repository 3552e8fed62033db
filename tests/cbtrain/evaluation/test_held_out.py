"""Held-out metrics."""

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from cbtrain.evaluation.held_out import evaluate, held_out
from cbtrain.model.checks import prepare
from cbtrain.model.loading import load_base
from cbtrain.model.lora import add_adapter
from cbtrain.model.partial_forward import Decoder


def metrics_of(config) -> dict[str, float]:
    data, pad = prepare(config)
    model = add_adapter(load_base(config), config)
    try:
        return evaluate(Decoder(model, config.hidden_states), held_out(data, config, pad), config)
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


def test_every_metric_has_its_value_written_out(small_config):
    """Against plain forwards of the whole held-out set, one row at a time, and the definitions written out."""
    config = replace(small_config, lora_init_std=0.3, target_layers=(1, 2))
    data, pad = prepare(config)
    model = add_adapter(load_base(config), config)
    found = evaluate(Decoder(model, config.hidden_states), held_out(data, config, pad), config)
    base = model.get_base_model()
    values, distances = defaultdict(list), defaultdict(list)
    for side, rows in (("harmful", data.harmful.held_out), ("benign", data.benign.held_out)):
        for row in rows:
            ids, scored = torch.tensor([row.input_ids]), torch.tensor(row.scored)
            with torch.no_grad():
                student = base(ids, output_hidden_states=True)
                with model.disable_adapter():
                    teacher = base(ids, output_hidden_states=True)
            log_q, log_p = student.logits[0].log_softmax(-1), teacher.logits[0].log_softmax(-1)
            for i in range(1, len(row.input_ids)):
                if scored[i]:
                    values[f"eval_{side}_nll"].append(-log_q[i - 1, row.input_ids[i]])
                    values[f"base_{side}_nll"].append(-log_p[i - 1, row.input_ids[i]])
                    if side == "benign":
                        pairs = zip(log_p[i - 1].tolist(), log_q[i - 1].tolist(), strict=True)
                        kl = sum(math.exp(p) * (p - q) for p, q in pairs)
                        values["eval_benign_kl"].append(kl)
                        agree = log_p[i - 1].argmax() == log_q[i - 1].argmax()
                        values["eval_benign_top1_agreement"].append(agree.float())
            for layer in config.target_layers:
                ours, theirs = student.hidden_states[layer][0][scored], teacher.hidden_states[layer][0][scored]
                if side == "harmful":
                    cosine = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
                    values["eval_loss_reroute"] += [max(value, 0.0) for value in cosine.tolist()]
                    values[f"eval_cosine_layer_{layer}"] += cosine.tolist()
                    values[f"eval_cosine_positive_layer_{layer}"] += (cosine > 0).float().tolist()
                else:
                    values["eval_loss_retain"] += (ours - theirs).pow(2).sum(-1).sqrt().tolist()
                    values[f"base_norm_layer_{layer}"] += theirs.pow(2).sum(-1).sqrt().tolist()
                    distances[layer] += (ours - theirs).pow(2).sum(-1).sqrt().tolist()
    model.unload()
    for layer, distance in distances.items():
        shares = sum(distance) / sum(values[f"base_norm_layer_{layer}"])
        values["eval_loss_retain_relative"].append(shares)
        values[f"eval_distance_layer_{layer}"].append(shares)
    assert found.keys() == values.keys()
    assert min(values["eval_cosine_layer_1"]) < 0 < max(values["eval_cosine_layer_1"]), "no negative cosine to tell by"
    for name, expected in values.items():
        assert found[name] == pytest.approx(float(sum(expected)) / len(expected), rel=1e-4), name


def test_retain_covers_the_layers_that_training_retains(small_config):
    config = replace(small_config, lora_init_std=0.1, lora_layers=(1,), target_layers=(2,))
    target, every = metrics_of(config), metrics_of(replace(config, retain_layers="all"))
    assert every["eval_loss_retain"] != pytest.approx(target["eval_loss_retain"], rel=1e-3)
    assert every["eval_loss_reroute"] == target["eval_loss_reroute"]
