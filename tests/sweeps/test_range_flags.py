"""The two flags of what is searched, from the command line to sweep.json and back."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
from commands import world as data_flags

from analysis.report.commands import wider_command
from analysis.surrogate.search_space import SearchSpace
from cbtrain.config import InputError, cli
from cbtrain.model.auto import derived
from sweeps import kl_ablation
from sweeps.plan.budget import PlanSettings
from sweeps.settings import SweepSettings
from sweeps.storage.resume import recorded
from sweeps.storage.run_directory import RunDirectory


def ranges_of(*arguments: str) -> tuple[tuple[float, float], tuple[float, float]]:
    settings = cli.parse(SweepSettings, arguments, "kl_ablation.py", derived=derived)
    return settings.beta_kl_range, settings.kl_temperature_range


def test_ranges_are_read_and_one_temperature_is_both_ends() -> None:
    assert ranges_of() == ((1e-3, 2.0), (1.0, 4.0))
    assert ranges_of("--beta-kl-range", "0.1", "3", "--steps", "9") == ((0.1, 3.0), (1.0, 4.0))
    for arguments in (["--kl-temperature-range", "2"], ["--kl_temperature_range=2"], ["--kl-temperature-range", *"22"]):
        assert ranges_of(*arguments) == ((1e-3, 2.0), (2.0, 2.0)), arguments


def test_the_command_that_is_named_for_a_pick_at_an_end_searches_what_it_says(trials_at_an_end) -> None:
    decision, sweep = trials_at_an_end
    words = shlex.split(wider_command(decision, sweep, 9))
    assert words[:2] == ["python", "sweeps/kl_ablation.py"]
    settings = cli.parse(SweepSettings, words[2:], "kl_ablation.py", derived=derived)
    plan = PlanSettings(beta_kl_range=settings.beta_kl_range, kl_temperature_range=settings.kl_temperature_range)
    assert plan.searched == decision.wider == SearchSpace((0.001, 20.0), (2.0, 2.0))
    assert (settings.num_samples, settings.baseline_seeds, settings.config.steps) == (9, 5, 90)


@pytest.fixture
def trials_at_an_end():
    from analysis.decision import Decision

    searched = SearchSpace(kl_temperature=(2.0, 2.0))
    wider = SearchSpace((0.001, 20.0), (2.0, 2.0))
    decision = Decision("choose", "", 0.05, 0.95, (), 9, searched=searched, wider=wider)
    settings = dataclasses.asdict(PlanSettings(num_samples=9, baseline_seeds=5, kl_temperature_range=(2.0, 2.0)))
    return decision, {"preset": "tiny", "config_overrides": {"steps": 90}, "settings": settings}


def test_the_plan_goes_by_the_flags(small_world, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--beta-kl-range", "0.2", "3", "--kl-temperature-range", "1", "--num-samples", "12", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *data_flags(small_world, tmp_path), *flags])
    assert cli.run(kl_ablation.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "plan      12 trials = 3 baseline + 2 ablation + 7 search" in lines
    assert "search    beta_kl 0.2–3 (log) at kl_temperature 1 · Gaussian process" in lines
    said = " ".join(" ".join(lines).split())
    assert "left out as outside the ranges: ablation (0.1, T 1), ablation (0.3, T 2)" in said


def test_a_resumed_sweep_takes_its_own_ranges_and_none_from_the_command_line(small_config, tmp_path) -> None:
    plan = PlanSettings(num_samples=9, beta_kl_range=(0.2, 3.0), kl_temperature_range=(2.0, 2.0), baseline_seeds=3)
    run = RunDirectory(Path(tmp_path))
    record = {"config": dataclasses.asdict(small_config), "settings": dataclasses.asdict(plan), "plan": {"baseline": 3}}
    run.record = json.loads(json.dumps(record))
    _, found = recorded(run, SweepSettings(), ["--resume", "run"])
    assert found == plan
    with pytest.raises(InputError, match=r"--kl-temperature-range: comes from .*/sweep.json when resuming"):
        recorded(run, SweepSettings(), ["--resume", "run", "--kl-temperature-range", "1"])
    run.record["settings"]["beta_kl_range"] = [3.0, 0.2]
    with pytest.raises(InputError, match=r"sweep.json: settings: --beta-kl-range 3 0.2: must be two numbers"):
        recorded(run, SweepSettings(), ["--resume", "run"])
