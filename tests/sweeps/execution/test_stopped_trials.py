"""A search trial that ends itself: who gets a rule, what a stopped trial leaves, with one worker and with two."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import ray.train
from simulated import completed, plan_of, tell_baselines

from cbtrain.config import CircuitBreakerConfig, InputError
from sweeps.execution.context import TrialContext
from sweeps.execution.driver import SweepDriver
from sweeps.execution.searcher import PlanSearcher
from sweeps.execution.training import train_loop
from sweeps.execution.trial import run_trial
from sweeps.plan.early_stopping import StopRule, held_out_curve, judge, require_stoppable, rule_for
from sweeps.plan.journal import TrialSpec
from sweeps.runtime.placement import Workers
from sweeps.storage.run_directory import RunDirectory

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cbtrain.training.loop", "sweeps.execution.training"])
STEPS = 10
SPEC = TrialSpec("t007", "search", 0.5, 1.0, 0)
RULE = StopRule(
    limits=dict.fromkeys(range(4, STEPS, 2), 0.0),
    baseline=dict.fromkeys(range(4, STEPS, 2), 0.0),
    goal=0.0,
    steps=STEPS,
)
"""No loss is within a limit of 0, nor falls to a goal of 0: a trial evaluated every 2 steps is stopped at its second
judged evaluation."""


@pytest.fixture
def config(small_config: CircuitBreakerConfig) -> CircuitBreakerConfig:
    """Ten steps, evaluated and checkpointed at every second."""
    # With so little training between two evaluations the loss stays near 1 and falls too slowly for any goal.
    return dataclasses.replace(small_config, steps=STEPS, lr=1e-6, checkpoint_every=2)


def context_of(config: CircuitBreakerConfig, run_dir: Path, **workers: int) -> TrialContext:
    return TrialContext(config=config, run_dir=run_dir, workers=Workers(**workers))


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What a trial reports to Tune."""
    results: list[dict] = []
    monkeypatch.setattr("ray.tune.report", results.append)
    return results


def write_curve(trial: Path, curve: dict[int, float]) -> None:
    trial.mkdir(parents=True)
    lines = [json.dumps({"step": step, "eval_loss_reroute": loss}) for step, loss in curve.items()]
    (trial / "metrics.jsonl").write_text("\n".join([json.dumps({"step": 1, "loss": 2.0}), *lines]) + "\n")


def test_only_search_trials_get_a_rule_and_it_is_that_of_their_seed(quick, tmp_path):
    plan = plan_of(12)
    for seed in range(3):
        write_curve(tmp_path / f"t{seed:03d}", {4: 0.1 + seed / 100, 6: 0.1, 10: 0.01})
    rules = {}
    searcher = PlanSearcher(plan, rule_for=lambda spec: rule_for(spec, plan, tmp_path, STEPS))
    while not plan.done:
        given = searcher.suggest("ray")
        assert isinstance(given, dict)
        rules[given["trial_id"]] = given.pop("stop_rule", None)
        plan.tell(given["trial_id"], completed(0.01))
    phases = {str(row["trial_id"]): (row["phase"], row["seed"]) for row in plan.rows()}
    assert {phases[trial_id][0] for trial_id, rule in rules.items() if rule} == {"search"}
    assert {phases[trial_id][0] for trial_id, rule in rules.items() if not rule} == {"baseline", "ablation"}
    for trial_id, rule in rules.items():
        if rule:
            assert rule.baseline == {4: 0.1 + phases[trial_id][1] / 100, 6: 0.1}
            assert rule.goal == pytest.approx(0.01 + plan.tolerance)
    assert searcher.failure is None


def test_baselines_that_failed_or_left_no_curve_carry_no_rule(quick, tmp_path):
    plan = plan_of(12)
    tell_baselines(plan, 0.01, 0.01, None)
    for seed in range(3):
        write_curve(tmp_path / f"t{seed:03d}", {4: 0.1, 6: 0.1, 10: 0.01})
    assert rule_for(SPEC, plan, tmp_path, STEPS) is None, "two completed"

    plan = plan_of(12)
    assert rule_for(SPEC, plan, tmp_path, STEPS) is None, "not in yet"
    tell_baselines(plan, 0.01, 0.01, 0.01)
    assert rule_for(SPEC, plan, tmp_path, STEPS) is not None
    shutil.rmtree(tmp_path / "t001")
    assert rule_for(SPEC, plan, tmp_path, STEPS) is None


def test_a_stopped_trial_is_a_row_with_its_reason_and_leaves_no_adapter(quick, config, tmp_path, reported, capsys):
    run = RunDirectory(tmp_path)
    plan = plan_of(12)
    driver = SweepDriver(run, plan.settings, 1, early_stop=True)
    searcher = PlanSearcher(driver._plan, rule_for=lambda spec: RULE if spec.phase == "search" else None)
    given: dict = {}
    while given.get("phase") != "search":
        given = searcher.suggest(str(len(given)))
        if given["phase"] != "search":
            driver._plan.tell(given["trial_id"], completed(0.01, train_s=1.0))
    run_trial(given, context_of(config, tmp_path))
    directory = run.trial(given["trial_id"])
    assert (directory / "checkpoint").is_dir()
    assert [result.get("step") for result in reported] == [2, 4, 6, None]
    searcher.on_trial_complete("5", reported[-1])
    assert searcher.failure is None
    driver._keep(driver._plan.rows())

    row = pd.read_csv(tmp_path / "trials.csv").set_index("trial_id").loc[given["trial_id"]]
    assert (row.status, row.steps) == ("stopped", 6)
    assert row.error.startswith("step 6: held-out reroute ")
    assert row.eval_loss_reroute == reported[-2]["eval_loss_reroute"]
    assert 0 < row.train_s < row.wall_s
    assert pd.isna(row.reroute_regression)
    assert pd.isna(row.feasible)
    assert not (directory / "adapter").exists()
    assert not (directory / "checkpoint").exists()
    assert max(held_out_curve(directory)) == 6
    assert f"stopped: {row.error}" in capsys.readouterr().out


def test_a_resumed_trial_counts_its_evaluations_before_the_checkpoint(config, tmp_path):
    context = context_of(config, tmp_path)
    first = Reports(kill_at=6)
    with pytest.raises(KeyboardInterrupt):
        train_loop(SPEC, context, RULE, first)
    again = Reports()
    metrics, reason = train_loop(SPEC, context, RULE, again)
    # Step 4, the first that is judged, lies before the checkpoint, from which the trial went on.
    assert (first.steps, again.steps) == ([2, 4, 6], [6])
    assert (metrics["step"], metrics["resumed_from"]) == (6, 4)
    assert metrics["earlier_s"] > 0
    assert "as at step 4" in reason


class Reports:
    """Takes a trial's reports, and interrupts it at a step."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.steps: list[float] = []
        self.kill_at = kill_at

    def __call__(self, metrics: dict[str, float]) -> None:
        self.steps.append(metrics["step"])
        if metrics["step"] == self.kill_at:
            raise KeyboardInterrupt


def test_what_an_earlier_attempt_did_later_does_not_stop_a_trial_that_begins_anew():
    curve = {2: 1.0, 4: 1.0, 6: 1.0}
    judge(RULE, curve, {"step": 2, "eval_loss_reroute": 0.5})
    assert curve == {2: 0.5}


def test_a_half_written_line_is_no_evaluation(tmp_path):
    write_curve(tmp_path / "t000", {2: 0.5, 4: 0.25})
    with (tmp_path / "t000" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "eval_loss_rer')
    assert held_out_curve(tmp_path / "t000") == {2: 0.5, 4: 0.25}
    assert held_out_curve(tmp_path / "t001") == {}


def test_two_workers_stop_alike_and_end_without_an_exception(config, tmp_path):
    context = context_of(dataclasses.replace(config, zero_stage=2), tmp_path, count=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=one_of_two, args=(rank, port, context), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    (metrics, reason), other = (json.loads((tmp_path / f"returned-{rank}").read_text()) for rank in (0, 1))
    assert (metrics["step"], reason[:8]) == (6, "step 6: ")
    assert other[1] == reason
    for rank in (0, 1):
        assert f"stopped: {reason}" in (tmp_path / "logs" / f"t007-rank{rank}.log").read_text()
    assert not (tmp_path / "trials" / "t007" / "adapter").exists()


def one_of_two(rank: int, port: int, context: TrialContext) -> None:
    """One of a trial's two workers, with what Ray Train gives it."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in address.items()})
    ray.train.report = lambda _metrics: None
    ray.train.get_context = lambda: SimpleNamespace(get_world_rank=lambda: rank)
    returned = train_loop(SPEC, context, RULE)
    (context.run_dir / f"returned-{rank}").write_text(json.dumps(returned))


@pytest.mark.parametrize(
    ("steps", "every", "baselines", "message"),
    [
        (
            70,
            0,
            3,
            "with --eval-every 0 a trial of 70 steps has 1 held-out evaluation, stopping needs 3; give --eval-every 14",
        ),
        (70, 35, 3, "has 2 held-out evaluations, stopping needs 3"),
        (2, 1, 3, "give more --steps"),
        (70, 14, 2, "--early-stop: 2 baseline seeds, stopping needs 3; give --baseline-seeds 3"),
    ],
)
def test_early_stop_where_nothing_could_be_stopped_is_refused(small_config, steps, every, baselines, message):
    config = dataclasses.replace(small_config, steps=steps, eval_every=every)
    with pytest.raises(InputError) as caught:
        require_stoppable(config, baselines)
    assert message in str(caught.value)
    require_stoppable(dataclasses.replace(small_config, steps=70, eval_every=34), 3)
