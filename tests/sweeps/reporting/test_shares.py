"""Where a sweep's time went: the shares are of what its slots had, and what is not accounted for was idle."""

import json
from pathlib import Path

import pytest

from sweeps.reporting.shares import shares, told


def profiled(trials: Path, trial_id: str, **seconds: float) -> dict[str, object]:
    """A row of trials.csv of ten seconds, and the profile of its loop."""
    (trials / trial_id).mkdir(parents=True)
    (trials / trial_id / "profile.json").write_text(json.dumps({"seconds": {**seconds, "other": 1.0, "total": 9.0}}))
    return {"trial_id": trial_id, "wall_s": 10.0}


def test_shares_are_of_wall_times_slots_and_the_rest_is_idle(tmp_path):
    rows = [profiled(tmp_path, "t000", backward=4.0, kl=1.0), profiled(tmp_path, "t001", backward=5.0, evaluation=2.0)]
    rows += [{"trial_id": "t002", "wall_s": None}]
    found = shares(rows, tmp_path, wall_s=20.0, concurrency=2)
    assert found["backward"] == pytest.approx(9 / 40)
    assert found["kl"] == pytest.approx(1 / 40)
    assert found["start"] == pytest.approx((5 + 3) / 40), "what a trial took beyond the kinds of its loop"
    assert found["idle"] == pytest.approx(20 / 40)
    assert sum(found.values()) == pytest.approx(1)
    assert told(found) == "profile   backward 22 %, start and end of trials 20 %, evaluation 5 %, KL 2 %, idle 50 %"


def test_without_profiles_nothing_is_told(tmp_path):
    assert told(shares([{"trial_id": "t000", "wall_s": 3.0}], tmp_path, 5.0, 1)) == ""
