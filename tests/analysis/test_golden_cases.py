"""Whole cases, from files to exit status: what the command says of a sweep, with which numbers, and what comes next."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic import MakeRun, Surface, failing, make_trials, repeated, write_behaviour

from analysis.pick_beta import main

PICK = (0.3, 1.0)
TRAIN = r"python -m cbtrain\.train --from-decision \S+/report/decision\.json$"
AGAIN = r"python analysis/pick_beta\.py \S+/run$"
RESUME = r"python sweeps/kl_ablation\.py --resume \S+/run$"
LIMIT = r"95 % sure that it loses at most \+0\.0\d\d of 0\.049 allowed"


def sweep() -> pd.DataFrame:
    return make_trials(Surface())


def ties() -> pd.DataFrame:
    """Two settings with the same drift, one of which loses less."""
    trials = make_trials(Surface(), searched=0)
    trials.loc[trials["beta_kl"] > 0, "eval_benign_kl"] = 0.5
    return trials


def temperature_inert() -> pd.DataFrame:
    trials = make_trials(Surface(temperature_weight=0.0))
    with_kl = trials["beta_kl"] > 0
    trials.loc[with_kl, "eval_benign_kl"] = 0.4 / trials.loc[with_kl, "beta_kl"].clip(lower=1e-3) ** 0.5
    return trials


def all_feasible() -> pd.DataFrame:
    """The corner of the ranges ran, and drifts least."""
    surface = Surface(threshold=50.0)
    trials = make_trials(surface)
    corner = ["beta_kl", "kl_temperature", "eval_benign_kl"]
    trials.loc[trials.index[-1], corner] = [2.0, 4.0, float(surface.drift(2.0, 4.0))]
    return trials


def running() -> pd.DataFrame:
    trials = sweep()
    trials.loc[[12, 13], "status"] = "running"
    trials.loc[[12, 13], ["eval_loss_reroute", "eval_benign_kl"]] = float("nan")
    return trials


@dataclass(frozen=True)
class Case:
    """A sweep's files, and what is said of them."""

    trials: Callable[[], pd.DataFrame]
    verdict: str
    status: int
    said: tuple[str, ...]
    next: str
    behaviour: dict[str, dict[str, float]] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    killed: bool = False
    """Whether its lock names a process that lives no more."""


CASES = {
    "failed baseline seed": Case(
        lambda: failing(sweep(), "t001"),
        *("choose", 0),
        (
            r"^Use beta_kl = 0\.3 at kl_temperature = 1\.0",
            r"suspect: t001, seed 1, beta_kl 0: reroute \+0\.9",
            r"1 of 4 baseline seeds never rerouted as the others did \(t001, seed 1: reroute 0\.97\)",
            LIMIT,
        ),
        TRAIN,
    ),
    "failed confirmation": Case(
        lambda: failing(repeated(sweep(), PICK, (2, 3)), "t101"),
        *("choose", 0),
        (r"^Use beta_kl = 0\.3", LIMIT, r"3 seeds of which 1 failed, not yet confirmed", r"suspect: t101, seed 3"),
        TRAIN,
    ),
    "failed ablation point": Case(
        lambda: failing(sweep(), "t004"),
        *("choose", 0),
        (r"^Use beta_kl = 0\.3", LIMIT, r"suspect: t004, seed 0, beta_kl 0\.1, T 1\.0: reroute \+0\.9"),
        TRAIN,
    ),
    "two of three seeds failed": Case(
        lambda: failing(repeated(sweep(), PICK, (2, 3)), "t100", "t101"),
        *("choose", 0),
        (r"^Use beta_kl = (?!0\.3 )", r"suspect: t100, seed 2, beta_kl 0\.3", r"suspect: t101, seed 3, beta_kl 0\.3"),
        TRAIN,
    ),
    "most baseline seeds failed": Case(
        lambda: failing(sweep(), "t001", "t002"),
        *("baseline_never_rerouted", 3),
        (r"^Cannot choose beta_kl: the baseline does not reroute at every seed\.", r"2 of 4 baseline seeds"),
        r"python sweeps/kl_ablation\.py --preset tiny .*--steps 140",
    ),
    "nothing holds": Case(
        sweep,
        *("no_setting_behaves", 3),
        (r"^Ship none of these", r"beta_kl 0\.3, T 1\.0: 50 % of the answers to benign prompts are degenerate \(0 %"),
        r"python sweeps/kl_ablation\.py --preset tiny .*--retain-norm relative",
        {"t000": {}, **{f"t{index:03d}": {"degenerate": 0.5} for index in range(4, 18)}},
    ),
    "benign text broken without KL, kept with it": Case(
        sweep,
        *("choose", 0),
        (r"^Use beta_kl = 0\.3 at kl_temperature = 1\.0, but on one seed\.", LIMIT),
        TRAIN,
        {"t000": {"degenerate": 1.0}, "t005": {}},
    ),
    "behaviour missing": Case(
        sweep, "choose", 0, (r"^Use beta_kl = 0\.3 .*but on one seed and behaviour not measured\.",), TRAIN
    ),
    "running": Case(
        running,
        *("choose", 4),
        (r"^So far \(16 of 18, 2 running\): Use beta_kl = 0\.3",),
        AGAIN,
        sweep={"status": "running"},
    ),
    "interrupted": Case(
        running,
        *("choose", 4),
        (r"^So far \(16 of 18, 2 interrupted\): Use beta_kl = 0\.3",),
        RESUME,
        sweep={"status": "interrupted"},
    ),
    "killed": Case(
        lambda: sweep().iloc[:14],
        *("choose", 4),
        (r"^So far \(14 of 20\): Use beta_kl = ",),
        RESUME,
        sweep={"status": "running", "settings": {"num_samples": 20}},
        killed=True,
    ),
    "all feasible": Case(
        all_feasible,
        *("choose", 0),
        (
            r"warning: The pick sits at the upper end of the beta_kl range 0\.001–2",
            r"wider\s+python sweeps/kl_ablation",
        ),
        TRAIN,
    ),
    "ties": Case(ties, "choose", 0, (r"^Use beta_kl = 0\.\d", LIMIT), TRAIN),
    "temperature inert": Case(temperature_inert, "choose", 0, (r"^Use beta_kl = 0\.\d+", LIMIT), TRAIN),
    "none qualifies": Case(
        lambda: make_trials(Surface(always_lost=0.2), searched=14),
        *("no_candidate_qualifies", 3),
        (
            r"^Use beta_kl = 0: no KL weight qualifies, all from 0\.001 to 2 lose too much",
            r"Without KL benign drift is 9\.63 nats/token",
        ),
        TRAIN.removesuffix("$") + " --despite-verdict$",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_told_as_it_is(make_run: MakeRun, capsys: pytest.CaptureFixture[str], name: str):
    case = CASES[name]
    run = make_run(case.trials(), **case.sweep)
    if case.killed:
        (run / "lock").write_text(f"{socket.gethostname()}:{_ended_process()}")
    for trial_id, shares in case.behaviour.items():
        write_behaviour(run, trial_id, **shares)
    assert main([str(run)]) == case.status
    output = " ".join(capsys.readouterr().out.replace("\\\n", " ").split())
    record = json.loads(Path(run, "report", "decision.json").read_text())
    assert record["verdict"] == case.verdict
    for pattern in case.said:
        assert re.search(pattern, output), (pattern, output)
    command = re.sub(r" report \S+report\.html", "", output)
    assert re.search(case.next, command), (case.next, command)


def _ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
