"""Calibration: when a run's outcome is clear, what is tried next, that it ends in time and pretends nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cbtrain.calibration import ladder
from cbtrain.calibration.ladder import calibrate
from cbtrain.calibration.outcome import judge, steps_allowed
from cbtrain.config import InputError
from cbtrain.config.saved import with_calibration


def evaluation(step: int, reroute: float, cosines: tuple[float, float], distance: float = 0.05) -> dict[str, float]:
    """A held-out evaluation; benign hidden states have moved by `distance` at layer 2 and by none at layer 1."""
    layers = {"eval_cosine_layer_1": cosines[0], "eval_cosine_layer_2": cosines[1]}
    moved = {"eval_distance_layer_1": 0.0, "eval_distance_layer_2": distance}
    return {"step": step, "loss_reroute": reroute, "eval_loss_reroute": reroute} | layers | moved


@pytest.fixture
def config(small_config):
    return replace(small_config, steps=100, warmup_steps=0, target_layers=(1, 2), retain_norm="relative", lr=1e-3)


@pytest.mark.parametrize(
    ("evaluations", "outcome"),
    [
        ([(10, 0.995, (0.99, 0.99))], "unmoved"),
        ([(5, 0.995, (0.99, 0.99))], None),
        ([(10, 0.9, (0.9, 0.9))], None),
        ([(10, 0.9, (0.9, 0.9)), (20, 0.1, (0.1, 0.1))], None),
        ([(10, 0.1, (0.1, 0.1)), (20, 0.1, (0.1, 0.1))], "converged"),
        ([(10, 0.1, (0.1, 0.1)), (20, 0.1, (0.1, 0.1), 0.6)], None),
        ([(90, 0.1, (0.1, 0.1)), (100, 0.1, (0.1, 0.1), 0.6)], "inseparable"),
        ([(80, 0.5, (0.9, -0.1)), (100, 0.5, (0.9, -0.1))], "unsettled"),
        ([(80, 0.98, (0.98, 0.98)), (100, 0.95, (0.95, 0.95))], "unsettled"),
    ],
)
def test_an_outcome_is_told_as_soon_as_it_is_clear(config, evaluations, outcome):
    assert judge([evaluation(*each) for each in evaluations], config) == outcome


def test_nothing_is_judged_unmoved_while_the_learning_rate_still_warms_up(config):
    warming = replace(config, warmup_steps=15)
    assert judge([evaluation(20, 0.995, (0.99, 0.99))], warming) is None
    assert judge([evaluation(25, 0.995, (0.99, 0.99))], warming) == "unmoved"


class Scripted:
    """Stands for `train`: what a recipe and seed come to, by a rule; a whole run is ten evaluations."""

    def __init__(self, rule):
        self.rule, self.ran = rule, []

    def __call__(self, config, directory, report, teacher_cache=None):
        self.ran.append((config.lr, config.retain_scale, config.seed))
        for step in range(config.eval_every, config.steps + 1, config.eval_every):
            report(self.rule(config, step) | {"train_s": 1.0, "eval_s": 0.5})


def collapsing(config, step):
    return evaluation(step, 0.05, (0.05, 0.05)) if step >= 20 else evaluation(step, 0.9, (0.9, 0.9))


def climb(config, tmp_path, monkeypatch, rule, max_steps=1000, fixed=()):
    scripted = Scripted(rule)
    monkeypatch.setattr(ladder, "train", scripted)
    monkeypatch.setattr(ladder, "run_teacher", lambda *_: ladder_pass(config))
    return calibrate(config, tmp_path / "runs", max_steps=max_steps, fixed=fixed), scripted.ran


def ladder_pass(config):
    from cbtrain.training.loop import TeacherPass

    return TeacherPass(retain_norms=(2.0, 3.0))


def test_the_first_recipe_that_converges_runs_on_three_seeds(config, tmp_path, monkeypatch):
    found, ran = climb(config, tmp_path, monkeypatch, collapsing)
    assert found.converged
    assert [seed for *_, seed in ran] == [0, 1, 2]
    assert found.settings == {"lr": config.lr, "retain_scale": config.retain_scale, "steps": 100}
    assert found.steps_spent == 90  # each ended at its first level evaluation
    assert found.config.retain_norms == (2.0, 3.0)


def test_a_learning_rate_that_moves_nothing_is_raised_and_soon_left(config, tmp_path, monkeypatch):
    needed = config.lr * 9

    def rule(config, step):
        return collapsing(config, step) if config.lr >= needed else evaluation(step, 1.0, (1.0, 1.0))

    found, ran = climb(config, tmp_path, monkeypatch, rule)
    assert [round(lr / config.lr, 3) for lr, *_ in ran] == [1, 3, 10, 10, 10]
    assert found.settings["lr"] == pytest.approx(10 * config.lr)
    assert [run.steps for run in found.runs[:2]] == [10, 10]


def test_a_layer_that_waits_has_the_retain_term_loosened(config, tmp_path, monkeypatch):
    def rule(config, step):
        return collapsing(config, step) if config.retain_scale < 5 else evaluation(step, 0.5, (0.98, -0.1))

    found, _ = climb(config, tmp_path, monkeypatch, rule)
    assert found.settings["retain_scale"] == pytest.approx(3.0)


def test_seeds_that_settle_far_apart_are_no_recipe(config, tmp_path, monkeypatch):
    def rule(config, step):
        stuck = config.seed == 1 and config.retain_scale > 5 and step >= 20
        return evaluation(step, 0.3, (0.3, 0.3)) if stuck else collapsing(config, step)

    found, ran = climb(config, tmp_path, monkeypatch, rule)
    assert found.settings["retain_scale"] == pytest.approx(3.0)
    assert [seed for *_, seed in ran] == [0, 1, 0, 1, 2]
    behind = found.runs[1]
    assert (behind.outcome, behind.why) == ("unsettled", "level at a reroute of 0.30, where seed 0 came to 0.05")
    assert "not settled at its end (level at a reroute of 0.30" in behind.line()


def test_a_seed_that_fails_sends_it_on(config, tmp_path, monkeypatch):
    def rule(config, step):
        failing = config.seed == 2 and config.retain_scale > 5
        return evaluation(step, 0.5, (0.98, -0.1)) if failing else collapsing(config, step)

    found, ran = climb(config, tmp_path, monkeypatch, rule)
    assert [seed for *_, seed in ran] == [0, 1, 2, 0, 1, 2]
    assert found.settings["retain_scale"] == pytest.approx(3.0)


def test_steps_grow_where_layers_collapse_late(config, tmp_path, monkeypatch):
    def rule(config, step):
        return evaluation(step, 0.05, (0.05, 0.05)) if step >= 70 else evaluation(step, 0.9, (0.9, 0.9))

    found, _ = climb(config, tmp_path, monkeypatch, rule)
    assert found.settings["steps"] == 140
    kept, _ = climb(config, tmp_path, monkeypatch, rule, fixed=("steps",))
    assert kept.settings["steps"] == 100


@pytest.mark.parametrize("allowed", [15, 100, 333])
def test_no_more_steps_are_taken_than_allowed_and_nothing_is_pretended(config, tmp_path, monkeypatch, allowed):
    found, _ = climb(
        config, tmp_path, monkeypatch, lambda config, step: evaluation(step, 0.05, (0.05, 0.05), 0.6), allowed
    )
    assert not found.converged
    assert not found.settings
    assert found.steps_spent <= allowed + config.steps // 10
    assert found.reason.startswith(f"No recipe converged in {found.steps_spent} of {allowed} steps allowed")


def test_a_recipe_that_only_the_budget_cut_off_is_named(config, tmp_path, monkeypatch):
    found, _ = climb(config, tmp_path, monkeypatch, collapsing, max_steps=70)
    assert [run.outcome for run in found.runs] == ["converged", "converged", "cut off"]
    assert found.reason == (
        f"lr {config.lr:g} at retain scale {config.retain_scale:g} converged at 2 of 3 seeds when the 70 steps allowed "
        "were spent: give it more (--max-steps, in a sweep --num-samples)."
    )


def test_what_is_fixed_stays(config, tmp_path, monkeypatch):
    rule = lambda config, step: evaluation(step, 1.0, (1.0, 1.0))  # noqa: E731
    found, ran = climb(config, tmp_path, monkeypatch, rule, fixed=("lr", "retain_scale"))
    assert {(lr, scale) for lr, scale, _ in ran} == {(config.lr, config.retain_scale)}
    assert not found.converged


def test_a_sweep_takes_the_recipe_from_the_file_and_refuses_one_of_another_run(config, tmp_path, monkeypatch):
    found, _ = climb(config, tmp_path, monkeypatch, collapsing)
    file = tmp_path / "calibration.json"
    found.write(file)
    taken = with_calibration(replace(config, lr=9.0, steps=7), file)
    assert (taken.lr, taken.steps) == (config.lr, 100)
    assert with_calibration(replace(config, lr=9.0), file, given=["lr"]).lr == 9.0
    with pytest.raises(InputError, match="made with batch_size 8, not 4; give --batch-size as there"):
        with_calibration(replace(config, batch_size=4), file)
    with pytest.raises(InputError, match=r"made with lora_init_std 0\.01, not 0\.5"):
        with_calibration(replace(config, lora_init_std=0.5), file)
    with pytest.raises(InputError, match=r"made with --benign .*benign\.jsonl, not other\.jsonl; calibrate anew"):
        with_calibration(replace(config, benign=("other.jsonl",)), file)
    (tmp_path / Path(config.model).name).mkdir()
    with pytest.raises(InputError, match="made for"):  # another directory of the same name
        with_calibration(replace(config, model=str(tmp_path / Path(config.model).name)), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"converged": False}))
    with pytest.raises(InputError, match="it found no recipe"):
        with_calibration(config, file)


def test_a_calibration_of_the_embedded_model_is_taken_for_it(config, tmp_path, monkeypatch):
    from cbtrain.config import get_config
    from cbtrain.model.loading import resolve

    named = get_config("tiny")
    found, _ = climb(config, tmp_path, monkeypatch, collapsing)
    replace(found, config=resolve(named)).write(tmp_path / "calibration.json")
    assert with_calibration(named, tmp_path / "calibration.json").lr == named.lr


def test_rows_that_are_alike_on_both_sides_cannot_be_told_apart(small_config, tmp_path):
    config = replace(small_config, steps=30, lora_init_std=0.05, lr=5e-3, retain_norm="relative", retain_scale=0.3)
    (tmp_path / "benign.jsonl").write_text(Path(config.harmful[0]).read_text())
    alike = replace(config, benign=(str(tmp_path / "benign.jsonl"),))
    found = calibrate(alike, tmp_path / "runs", max_steps=steps_allowed(20, 30))
    assert not found.converged
    assert found.runs
    assert found.steps_spent <= 120 + 3
