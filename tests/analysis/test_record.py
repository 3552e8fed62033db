"""decision.json against its JSON Schema, for every verdict, and what it says of where it comes from."""

import json
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
from synthetic import MakeRun, Surface, make_trials

from analysis.pick_beta import decided
from analysis.report.record import schema

WRITTEN = Path(__file__).parents[2] / "analysis" / "report" / "decision.schema.json"


def sweeps() -> dict[str, pd.DataFrame]:
    trials = make_trials(Surface())
    return {
        "choose": trials,
        "no_candidate_qualifies": make_trials(Surface(always_lost=0.2), searched=14),
        "no_setting_behaves": trials.assign(eval_harmful_nll=trials["base_harmful_nll"] + 8 * (trials["beta_kl"] == 0)),
        "insufficient_evidence": make_trials(Surface(), noise=0.08, searched=0, rng_seed=6),
        "baseline_never_rerouted": trials.assign(eval_loss_reroute=0.95),
        "baseline_failed": trials[trials["beta_kl"] > 0],
    }


def test_the_schema_in_the_repository_is_that_of_the_code():
    assert json.loads(WRITTEN.read_text()) == schema(), "python -m analysis.report.record > " + WRITTEN.name


@pytest.mark.parametrize("verdict", sweeps())
def test_every_verdict_is_written_as_the_schema_says(make_run: MakeRun, verdict: str):
    run = make_run(sweeps()[verdict])
    record = json.loads(decided(run).decision_json())
    assert record["verdict"] == verdict
    jsonschema.Draft202012Validator(json.loads(WRITTEN.read_text())).validate(record)
    assert next(iter(record)) == "schema_version"


def test_a_record_of_another_shape_is_refused_by_the_schema(make_run: MakeRun):
    run = make_run(make_trials(Surface()))
    record = json.loads(decided(run).decision_json())
    validator = jsonschema.Draft202012Validator(json.loads(WRITTEN.read_text()))
    for broken in (record | {"verdict": "perhaps"}, record | {"confidence": "high"}):
        assert not validator.is_valid(broken)
    del record["sentence"]
    assert not validator.is_valid(record)


def test_it_names_the_trials_that_it_rests_on_and_where_they_come_from(make_run: MakeRun):
    trials = make_trials(Surface()).assign(ended_at=1_790_000_000.0)
    trials.loc[trials["trial_id"] == "t004", ["eval_loss_reroute", "eval_benign_kl"]] = [0.97, 1e-3]
    trials.loc[trials["trial_id"] == "t010", "status"] = "failed"
    inputs = {"harmful.jsonl": "0" * 64}
    run = make_run(trials, begun_at="2026-09-21T12:00:00+0000", inputs=inputs, config={"model": "m", "steps": 70})
    record = json.loads(decided(run).decision_json())
    named = {each["trial_id"]: each for each in record["rests_on"]}
    assert set(trials["trial_id"]) - set(named) == {"t004", "t010"}
    assert named["t005"] == {"trial_id": "t005", "beta_kl": 0.3, "kl_temperature": 1.0, "seed": 0}
    assert (record["inputs"], record["model"]) == (inputs, "m")
    assert record["dates"] == {"begun": "2026-09-21T12:00:00+0000", "last_trial_ended": "2026-09-21T14:13:20+00:00"}
    assert record["limits"]["degenerate_rise"] == 0.05
