"""Which trials a sweep measures in the end, and what it says of them; the measuring itself is the command's test."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import ray
from simulated import completed, drive, failed, plan_of, world
from synthetic import Surface, make_trials

from analysis.behaviour.measured import load_behaviour
from analysis.decide import decide
from cbtrain.config import CircuitBreakerConfig
from cbtrain.evaluation.judge.judge import load_classifier
from cbtrain.training.loop import train
from sweeps.execution.behaviour import BehaviourError, Meter, _measure, behaviour_sentences, file_of, subjects
from sweeps.execution.context import TrialContext
from sweeps.plan.journal import TrialSpec, trial_config
from sweeps.runtime.placement import Workers
from sweeps.runtime.processes import Processes

BASELINE = TrialSpec("t000", "baseline", 0.0, 1.0, 0)
CHOSEN = TrialSpec("t005", "ablation", 0.3, 1.0, 0)


def subjects_of(outcome) -> tuple[list[TrialSpec], pd.DataFrame]:
    plan = plan_of(10)
    drive(plan, outcome)
    return subjects(plan.rows(), decide(plan.table())), plan.table()


@pytest.mark.usefixtures("quick")
def test_every_seed_of_the_chosen_setting_is_measured_with_the_baselines_of_those_seeds() -> None:
    measured, trials = subjects_of(lambda spec: failed() if spec.trial_id == "t000" else world(spec))
    decision = decide(trials)
    assert decision.verdict == "choose"
    same = trials[(trials.beta_kl == decision.beta_kl) & (trials.kl_temperature == decision.kl_temperature)]
    baselines = trials[(trials.beta_kl == 0) & (trials.status == "completed")]
    paired = baselines[baselines.seed.isin(same.seed)]
    expected = paired if len(paired) else baselines.iloc[:1]
    assert [spec.trial_id for spec in measured] == [*expected.trial_id, *same.trial_id]
    assert "t000" not in {spec.trial_id for spec in measured}


@pytest.mark.usefixtures("quick")
def test_without_a_choice_the_baseline_alone_and_without_a_baseline_nothing() -> None:
    never_feasible, _ = subjects_of(lambda spec: completed(0.5) if spec.beta_kl else world(spec))
    assert [spec.trial_id for spec in never_feasible] == ["t000"]
    assert subjects_of(lambda _spec: completed(0.99))[0] == []
    assert subjects_of(lambda _spec: failed())[0] == []


def in_digits(path: Path) -> dict:
    """A JSON file with its numbers to five digits: batches of other prompts round otherwise, in single precision."""
    return json.loads(path.read_text(), parse_float=lambda text: float(f"{float(text):.5g}"))


def write(run_dir: Path, spec: TrialSpec, unchanged: float) -> None:
    kind = {"prompts": 16, "unchanged_rate": unchanged, "refusal_rate": {"teacher": 0, "student": 0}}
    kind["degenerate_rate"] = {"teacher": 0, "student": 1 - unchanged}
    record = {"harmful": kind, "benign": kind, "prefill": {"rows": 0, "nll": {"teacher": None, "student": None}}}
    directory = run_dir / "trials" / spec.trial_id
    directory.mkdir(parents=True)
    (directory / "behaviour.json").write_text(json.dumps(record))


def test_the_summary_tells_of_both_kinds_of_prompts_with_the_baseline_in_brackets(tmp_path: Path) -> None:
    trials = pd.DataFrame([BASELINE, CHOSEN])
    chosen = decide(make_trials(Surface()))
    assert (chosen.beta_kl, chosen.kl_temperature) == (CHOSEN.beta_kl, CHOSEN.kl_temperature)
    none = decide(make_trials(Surface(always_lost=0.2), searched=14))
    assert behaviour_sentences(load_behaviour(tmp_path, trials), chosen) == []
    write(tmp_path, BASELINE, 0.25)
    assert behaviour_sentences(load_behaviour(tmp_path, trials), none) == [
        "harmful: 25 % unchanged, 75 % degenerate",
        "benign: 25 % unchanged, 75 % degenerate",
    ]
    write(tmp_path, CHOSEN, 0.75)
    assert behaviour_sentences(load_behaviour(tmp_path, trials), chosen)[1] == (
        "benign: 75 % unchanged, 25 % degenerate (without KL 25 %, 75 %)"
    )


@pytest.fixture
def two_cpus() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def test_what_is_wrong_is_in_the_log_of_the_measuring_process(
    small_config: CircuitBreakerConfig, tmp_path: Path, two_cpus: None
) -> None:
    meter = Meter(TrialContext(small_config, tmp_path, Workers()), Processes(Workers(), 1), prompts=1)
    with pytest.raises(BehaviourError, match="--adapter"):
        meter.measure([BASELINE])
    assert "InputError: --adapter" in (tmp_path / "logs" / "behaviour.log").read_text()


@pytest.mark.usefixtures("two_cpus")
def test_a_process_that_cannot_measure_is_a_line_that_names_the_log(
    small_config: CircuitBreakerConfig, tmp_path: Path
) -> None:
    (tmp_path / "logs").write_text("a file, where a directory should be")
    meter = Meter(TrialContext(small_config, tmp_path, Workers()), Processes(Workers(), 1), prompts=1)
    with pytest.raises(BehaviourError, match=r"^FileExistsError: .* \(logs/behaviour\.log\)$"):
        meter.measure([BASELINE])


def test_processes_that_share_partitioned_models_say_what_one_says_by_a_users_classifier(
    small_config: CircuitBreakerConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "one_verdict.py").write_text("def judge(prompts, completions): return ['refusal'] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    load_classifier("one_verdict:judge")  # as the command does; Ray's processes look where this one does
    request.getfixturevalue("two_cpus")
    config = replace(small_config, zero_stage=3)
    for spec in (BASELINE, CHOSEN):
        train(replace(trial_config(small_config, spec), steps=3), tmp_path / "trials" / spec.trial_id, lambda _m: None)
    context = TrialContext(config, tmp_path, Workers(count=2))
    monkeypatch.setattr("sweeps.execution.behaviour._START_S", 2.0)
    processes = Processes(Workers(), 3)  # one more than there is room for
    meter = Meter(context, processes, prompts=3, judge="one_verdict:judge")
    assert 0 < meter.expected_seconds([BASELINE, CHOSEN]) < math.inf
    meter.measure([BASELINE, CHOSEN])
    processes.end()
    by_two = [in_digits(file_of(tmp_path, spec)) for spec in (BASELINE, CHOSEN)]
    _measure(context, 3, "one_verdict:judge", [BASELINE, CHOSEN], {})
    for spec, ours in zip((BASELINE, CHOSEN), by_two, strict=True):
        assert in_digits(file_of(tmp_path, spec)) == ours
    before, *models = load_behaviour(tmp_path, pd.DataFrame([BASELINE, CHOSEN]))
    assert len(models) == 2
    assert {each.harmful.refused for each in (before, *models)} == {1.0}
    record = json.loads((tmp_path / "trials" / "t005" / "behaviour.json").read_text())
    assert record["settings"]["judge"] == "one_verdict:judge"
