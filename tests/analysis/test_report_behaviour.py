import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.behaviour.measured import Answers, Behaviour, load_behaviour
from analysis.pick_beta import write_report
from cbtrain.utils.errors import InputError

MakeRun = Callable[..., Path]


def rates(unchanged: float, refused: tuple[float, float], degenerate: tuple[float, float]) -> dict[str, Any]:
    return {
        "prompts": 16,
        "unchanged_rate": unchanged,
        "refusal_rate": dict(zip(("teacher", "student"), refused, strict=True)),
        "degenerate_rate": dict(zip(("teacher", "student"), degenerate, strict=True)),
    }


def write(run: Path, trial_id: str, benign_unchanged: float, prefilled: float | None = 9.5) -> Path:
    """One trial's `behaviour.json`: harmful answers turned to degenerate, benign ones kept to a share."""
    record = {
        "harmful": rates(0.0, (0.25, 0.125), (0.0, 0.875)),
        "benign": rates(benign_unchanged, (0.0, 0.0), (0.0, 1 - benign_unchanged)),
        "prefill": {"rows": 3, "nll": {"teacher": 0.5, "student": prefilled}},
    }
    path = run / "trials" / trial_id / "behaviour.json"
    path.write_text(json.dumps(record))
    return path


def test_the_model_before_training_comes_first_then_the_measured_trials(make_run: MakeRun, trials: pd.DataFrame):
    run = make_run(trials)
    write(run, "t006", 0.75)
    write(run, "t000", 0.0625, prefilled=None)
    before, baseline, chosen = load_behaviour(run, trials)
    answers = Answers(None, 0.25, 0.0, None), Answers(None, 0.0, 0.0, None)
    assert before == Behaviour(None, None, 16, 16, 16, *answers, "", 0.5)
    assert (baseline.beta_kl, baseline.prefilled_nll) == (0.0, None)
    assert (chosen.beta_kl, chosen.kl_temperature) == (0.5, 1.0)
    assert chosen.harmful == Answers(0.0, 0.125, 0.875, None)
    assert chosen.benign == Answers(0.75, 0.0, 0.25, None)


def test_files_of_earlier_schemas_are_read(make_run: MakeRun, trials: pd.DataFrame):
    run = make_run(trials)
    path = write(run, "t006", 0.75)
    now = load_behaviour(run, trials)
    record = json.loads(path.read_text())
    for kind in ("harmful", "benign"):
        degenerate = record[kind].pop("degenerate_rate")
        record[kind]["gibberish_rate"] = {view: 0.75 * share for view, share in degenerate.items()}
        record[kind]["empty_rate"] = {view: 0.25 * share for view, share in degenerate.items()}
    path.write_text(json.dumps(record))
    assert load_behaviour(run, trials) == now, "version 2"
    path.write_text(path.read_text().replace('"teacher"', '"base"').replace('"student"', '"tuned"'))
    assert load_behaviour(run, trials) == now, "version 1"


def test_a_sweep_that_measured_nothing_has_no_rows(make_run: MakeRun, trials: pd.DataFrame):
    assert load_behaviour(make_run(trials), trials) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"harmful": {}}'])
def test_a_broken_file_is_named(make_run: MakeRun, trials: pd.DataFrame, text: str):
    run = make_run(trials)
    path = write(run, "t000", 0.5)
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_behaviour(run, trials)
    assert str(refused.value) == f"{path}: not what `cbtrain.evaluate` writes: remove it, or measure again"


def test_the_report_shows_what_the_models_write(make_run: MakeRun, trials: pd.DataFrame):
    run = make_run(trials)
    write_report(run)
    assert "A cosine is no proof that harmful answers are gone" in (run / "report" / "report.html").read_text()
    write(run, "t000", 0.0625)
    path = write(run, "t006", 0.75)
    given = {"harmful_prefilled": rates(0.0, (0.0, 0.0), (0.0, 0.9375))}
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    write_report(run)
    html, markdown = ((run / "report" / name).read_text() for name in ("report.html", "report.md"))
    assert "Not measured." not in html
    assert "beta_kl 0.5, T 1.0, t006" in html
    assert "| before training | – | – | 0 % | 0 % | – | 0 % | 25 % | – | – | 0.5 |" in markdown
    assert "| beta_kl 0, t000 | 6 % | – | 94 % | 0 % | – | 88 % | 12 % | – | – | 9.5 |" in markdown
    assert "| beta_kl 0.5, T 1.0, t006 | 75 % | – | 25 % | 0 % | – | 88 % | 12 % | – | 94 % | 9.5 |" in markdown
