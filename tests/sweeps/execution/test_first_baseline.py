"""The other trials wait for the first baseline, or a second, and do not begin where neither rerouted."""

import json
import threading
import time
from pathlib import Path

import pytest

from sweeps.execution.first_baseline import NOT_BEGUN, wait_for_first_baseline


def evaluated(run: Path, trial_id: str, *losses: float) -> None:
    path = run / "trials" / trial_id / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": i, "eval_loss_reroute": loss}) + "\n" for i, loss in enumerate(losses)))


def sweep(run: Path, first: str, second: str = "running", phase: str = "baseline") -> None:
    rows = f"t000,baseline,{first}\nt001,{phase},{second}\nt002,ablation,running\n"
    (run / "trials.csv").write_text(f"trial_id,phase,status\n{rows}")


def test_the_first_waits_for_nobody(tmp_path):
    sweep(tmp_path, "running")
    assert wait_for_first_baseline(tmp_path, "t000") == ""


@pytest.mark.parametrize(
    ("losses", "status", "second", "reason"),
    [
        ((0.99, 0.5), "running", "running", ""),
        ((0.99, 0.5), "completed", "running", ""),
        ((0.99, 0.98), "completed", "completed", NOT_BEGUN),
        ((0.99, 0.98), "completed", "failed", ""),
        ((), "failed", "completed", ""),
    ],
)
def test_what_became_of_those_before_decides(tmp_path, losses, status, second, reason):
    evaluated(tmp_path, "t000", *losses)
    evaluated(tmp_path, "t001", 0.99, 0.97)
    sweep(tmp_path, status, second)
    assert wait_for_first_baseline(tmp_path, "t002") == reason


def test_a_second_baseline_has_its_turn_where_the_first_did_not_reroute(tmp_path):
    evaluated(tmp_path, "t000", 0.99, 0.98)
    sweep(tmp_path, "completed")
    assert wait_for_first_baseline(tmp_path, "t001") == ""
    evaluated(tmp_path, "t001", 0.99, 0.3)
    assert wait_for_first_baseline(tmp_path, "t002") == ""


def test_with_one_baseline_alone_it_decides(tmp_path):
    evaluated(tmp_path, "t000", 0.99, 0.98)
    sweep(tmp_path, "completed", phase="ablation")
    assert [wait_for_first_baseline(tmp_path, name) for name in ("t001", "t002")] == [NOT_BEGUN, NOT_BEGUN]


def test_it_waits_until_there_is_an_answer(tmp_path):
    evaluated(tmp_path, "t000", 0.99)
    sweep(tmp_path, "running")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(wait_for_first_baseline(tmp_path, "t001")), daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    evaluated(tmp_path, "t000", 0.99, 0.3)
    thread.join(timeout=5)
    assert found == [""]


def test_the_loss_of_a_training_step_shows_it_before_the_first_evaluation(tmp_path):
    sweep(tmp_path, "running")
    path = tmp_path / "trials" / "t000" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "loss_reroute": 0.99}\n{"step": 9, "loss_reroute": 0.4}\n{"step": 1')
    assert wait_for_first_baseline(tmp_path, "t001") == ""
