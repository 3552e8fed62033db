"""The Optuna dashboard on a journal that the plan wrote: what it shows of limit, metrics, baselines and verdict."""

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from browser import browser, needs_chromium
from children import waited_for
from simulated import completed, drive, file_storage, next_trial, plan_of, tell_baselines

from analysis.decide import decide
from sweeps.plan.dashboard import MEANING, METRIC_NAME, NOTE_PART, write_note
from sweeps.plan.plan import SweepPlan

get_note = pytest.importorskip("optuna_dashboard", reason="no optuna-dashboard in this environment").get_note

HISTORY = """[...document.querySelectorAll('.js-plotly-plot')].map(
    plot => plot.data.map(({name, marker, x, y}) => ({name, color: marker && marker.color, x: [...x], y: [...y]}))
).find(traces => traces.some(trace => trace.name === 'Best Value of kl_ablation'))"""
"""The lines and points of the plot that the study's page begins with."""
ATTRIBUTES = (
    "(text => text.includes('Best Trial (number=') && text.includes('settings') ? text : null)(document.body.innerText)"
)
"""The page's text, when the card of the best trial and the table beside it are there."""


@pytest.fixture
def plan(tmp_path: Path, quick: None) -> SweepPlan:
    """A sweep that has ended: its trial of lowest drift is over the limit."""
    plan = plan_of(14, file_storage(tmp_path))
    drive(plan)
    assert len({row["feasible"] for row in plan.rows()}) == 2
    assert not min(plan.rows(), key=lambda row: row["eval_benign_kl"])["feasible"]
    return plan


@contextlib.contextmanager
def dashboard(folder: Path) -> Iterator[str]:
    """The address of a dashboard on the journal in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(folder / "study.log"), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "dashboard.log").open("w") as log:
        process = subprocess.Popen([*command, "--server", "wsgiref"], stdout=log, stderr=log)
    try:
        yield waited_for(folder / "dashboard.log", r"Listening on (http://\S+)/", process)
    finally:
        process.terminate()
        process.wait(60)


def asked(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


@needs_chromium
def test_the_best_line_ends_on_a_feasible_trial_and_the_others_are_grey(plan: SweepPlan, tmp_path: Path) -> None:
    rows = {number: plan_row(plan, trial_id) for trial_id, number in plan._journal.numbers().items()}
    with dashboard(tmp_path) as address, browser() as chromium:
        page = chromium.new_page(viewport={"width": 1400, "height": 1600})
        page.goto(f"{address}/dashboard/studies/0")
        traces, text = (page.wait_for_function(script, timeout=60_000).json_value() for script in (HISTORY, ATTRIBUTES))
    best = next(trace for trace in traces if trace["name"] == "Best Value of kl_ablation")
    number = next(at for at, value in zip(best["x"], best["y"], strict=True) if value == best["y"][-1])
    assert rows[number]["feasible"], f"trial {number}: {rows[number]}"
    assert rows[number]["eval_benign_kl"] == min(row["eval_benign_kl"] for row in rows.values() if row["feasible"])
    grey = {at for trace in traces if trace.get("color") == "#cccccc" for at in trace["x"]}
    assert grey == {number for number, row in rows.items() if not row["feasible"]}, traces
    assert METRIC_NAME in text, text
    assert MEANING in text, text


def plan_row(plan: SweepPlan, trial_id: str) -> dict[str, Any]:
    return next(row for row in plan.rows() if row["trial_id"] == trial_id)


def test_metrics_are_columns_to_sort_by_and_importance_is_of_both_parameters(plan: SweepPlan, tmp_path: Path) -> None:
    with dashboard(tmp_path) as address:
        searched, baselines = (asked(f"{address}/api/studies/{study}") for study in (0, 1))
        importances = asked(f"{address}/api/studies/0/param_importances")["param_importances"][0]
    metrics = {"eval_benign_kl", "eval_loss_reroute", "eval_harmful_nll", "base_harmful_nll", "loss_kl"}
    for study, names in ((searched, metrics | {"reroute_regression"}), (baselines, metrics)):
        assert study["objective_names"] == [METRIC_NAME]
        assert names <= {attr["key"] for attr in study["union_user_attrs"] if attr["sortable"]}, study[
            "union_user_attrs"
        ]
    shown = [{attr["key"]: attr["value"] for attr in trial["user_attrs"]} for trial in searched["trials"]]
    rows = [row for row in plan.rows() if row["phase"] != "baseline"]
    for name in sorted(metrics | {"reroute_regression"}):
        assert [float(trial[name]) for trial in shown] == [row[name] for row in rows], name
    assert [trial["constraints"] for trial in searched["trials"]] == [[row["reroute_regression"]] for row in rows]
    assert {each["name"] for each in importances} == {"beta_kl", "kl_temperature"}
    assert (baselines["name"], len(baselines["trials"])) == ("kl_ablation_baseline", plan.budget.baseline)


def test_the_verdict_is_the_studys_note_with_the_baselines(plan: SweepPlan, tmp_path: Path) -> None:
    decision = decide(plan.table(), reroute_tolerance=0.05, confidence=0.95, draws=64)
    plan.note(decision)
    written = (tmp_path / "study.log").read_text()
    plan.note(decision)
    again = (tmp_path / "study.log").read_text().removeprefix(written)
    assert "note" not in again, "a note that is there already was written again"
    study = optuna.load_study(study_name="kl_ablation", storage=file_storage(tmp_path))
    note = get_note(study)
    assert note.startswith(f"**{study.user_attrs['verdict']}**")
    for row in plan.rows():
        if row["phase"] == "baseline":
            assert f"| {row['trial_id']} | {row['seed']} | {row['eval_benign_kl']:.3g} |" in note, note


def test_a_note_of_many_parts_is_replaced_whole_by_a_short_one() -> None:
    study = optuna.create_study()
    for text in ("first", "long " * NOTE_PART, "short", ""):
        write_note(study._storage, study._study_id, text)
        assert get_note(study) == text


@pytest.mark.filterwarnings("error")
def test_a_sweep_killed_before_any_write_of_a_settled_trial_shows_it_as_if_it_had_not_been(tmp_path: Path) -> None:
    plan = plan_of(10, file_storage(tmp_path))
    tell_baselines(plan, 0.01, 0.01, 0.01)
    plan.tell(next_trial(plan).trial_id, completed(0.02, steps=80))
    journal = tmp_path / "study.log"
    lines = journal.read_text().splitlines(keepends=True)
    outcome = max(index for index, line in enumerate(lines) if '"outcome"' in line)
    whole = shown(tmp_path)
    assert whole["user_attrs"]["steps"] == 80
    for kept in range(outcome + 1, len(lines)):
        journal.write_text("".join(lines[:kept]))
        plan_of(10, file_storage(tmp_path))
        assert shown(tmp_path) == whole, f"killed after line {kept}"


def shown(folder: Path) -> dict[str, Any]:
    trial = optuna.load_study(study_name="kl_ablation", storage=file_storage(folder)).trials[0]
    return {name: getattr(trial, name) for name in ("state", "value", "params", "user_attrs", "system_attrs")}
