"""Reading a run directory: what comes back, and one line for what is broken."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import MakeRun

from analysis.trials import load_curves, load_settings, load_trials
from cbtrain.utils.errors import InputError


def test_trials_come_back_as_they_were_written(make_run: MakeRun, trials: pd.DataFrame) -> None:
    loaded = load_trials(make_run(trials))
    assert loaded["seed"].tolist() == trials["seed"].tolist()
    assert loaded["seed"].dtype.kind == "i"
    np.testing.assert_array_equal(loaded["eval_benign_kl"], trials["eval_benign_kl"])
    assert loaded["trial_id"].tolist() == trials["trial_id"].tolist()


def test_blank_metrics_of_unfinished_trials_are_nan(make_run: MakeRun, trials: pd.DataFrame) -> None:
    trials.loc[5, ["eval_benign_kl", "loss_kl"]] = np.nan
    trials.loc[5, "status"] = "running"
    loaded = load_trials(make_run(trials))
    assert np.isnan(loaded.loc[5, "eval_benign_kl"])
    assert loaded.loc[5, "status"] == "running"


def test_an_error_text_with_commas_quotes_and_line_breaks_survives(make_run: MakeRun, trials: pd.DataFrame) -> None:
    trials.loc[2, "error"] = 'ValueError: "a", b\nc'
    assert load_trials(make_run(trials)).loc[2, "error"] == 'ValueError: "a", b\nc'


def damage(run: Path, old: str, new: str) -> None:
    path = run / "trials.csv"
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("eval_benign_kl", "benign_kl", "trials.csv:1", "no column eval_benign_kl"),
        ("t002,baseline,completed,0.0", "t002,baseline,completed,zero", "trials.csv:4", "beta_kl 'zero'"),
        ("t002,baseline,completed,0.0", "t002,baseline,completed,-1", "trials.csv:4", "0 or more"),
        ("t002,baseline,completed,0.0", "t002,baseline,completed,nan", "trials.csv:4", "0 or more"),
        ("t002,baseline,completed", "t002,baseline,done", "trials.csv:4", "status 'done'"),
        ("t002,baseline,completed,0.0,1.0,2", "t002,baseline,completed,0.0,1.0,", "trials.csv:4", "seed ''"),
        ("t003", "t001", "trials.csv:5", "also on line 3"),
    ],
)
def test_a_broken_line_is_named(
    make_run: MakeRun, trials: pd.DataFrame, old: str, new: str, where: str, what: str
) -> None:
    run = make_run(trials)
    damage(run, old, new)
    with pytest.raises(InputError) as error:
        load_trials(run)
    assert where in str(error.value)
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_in_the_middle_is_named(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials)
    text = (run / "trials.csv").read_text()
    (run / "trials.csv").write_text(text[: len(text) - 60])
    with pytest.raises(InputError, match=r"trials\.csv:19: .*half a line"):
        load_trials(run)


def test_bytes_that_are_no_text_are_refused(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials)
    (run / "trials.csv").write_bytes(b"\x80\xff\x00trial_id\n")
    with pytest.raises(InputError, match="not CSV"):
        load_trials(run)


def test_missing_directory_file_and_settings_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_trials(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"sweep\.json: no such file"):
        load_settings(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        load_settings(tmp_path / "file")
    (tmp_path / "sweep.json").write_text("[1]")
    with pytest.raises(InputError, match="no settings"):
        load_settings(tmp_path)
    (tmp_path / "sweep.json").write_text('{\n"settings": ')
    with pytest.raises(InputError, match=r"sweep\.json:2: not JSON"):
        load_settings(tmp_path)


def test_settings_are_the_whole_file(make_run: MakeRun, trials: pd.DataFrame) -> None:
    settings = load_settings(make_run(trials, tolerance=0.049))
    assert settings["settings"]["num_samples"] == len(trials)
    assert settings["tolerance"] == 0.049


def test_curves_have_a_row_a_logged_step(make_run: MakeRun, trials: pd.DataFrame) -> None:
    curves = load_curves(make_run(trials))
    assert len(curves) == 70 * len(trials)
    assert set(curves["trial_id"]) == set(trials["trial_id"])
    first = curves[curves["trial_id"] == "t000"]
    assert first["step"].tolist() == list(range(1, 71))


def test_a_half_written_last_line_is_left_out(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials)
    with (run / "trials" / "t000" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 71, "loss_rer')
    assert len(load_curves(run)) == 70 * len(trials)


def test_a_broken_line_inside_is_an_error(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials)
    path = run / "trials" / "t000" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n' + json.dumps({"step": 3}) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
        load_curves(run)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: no step"):
        load_curves(run)


def test_without_metrics_the_curves_are_empty(tmp_path: Path) -> None:
    assert load_curves(tmp_path).empty
