"""The other trials wait for the first baseline, and do not begin where it never rerouted."""

import json
import threading
import time
from pathlib import Path

import pytest

from sweeps.execution.first_baseline import NOT_BEGUN, wait_for_first_baseline


def evaluated(run: Path, *losses: float) -> None:
    path = run / "trials" / "t000" / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": i, "eval_loss_reroute": loss}) + "\n" for i, loss in enumerate(losses)))


def ended(run: Path, status: str) -> None:
    (run / "trials.csv").write_text(f"trial_id,status\nt000,{status}\nt001,running\n")


def test_the_first_waits_for_nobody(tmp_path):
    assert wait_for_first_baseline(tmp_path, "t000") == ""


@pytest.mark.parametrize(
    ("losses", "status", "reason"),
    [
        ((0.99, 0.5), "running", ""),
        ((0.99, 0.5), "completed", ""),
        ((0.99, 0.98), "completed", NOT_BEGUN),
        ((), "failed", ""),
        ((0.99,), "stopped", ""),
    ],
)
def test_what_became_of_it_decides(tmp_path, losses, status, reason):
    evaluated(tmp_path, *losses)
    ended(tmp_path, status)
    assert wait_for_first_baseline(tmp_path, "t005") == reason


def test_it_waits_until_there_is_an_answer(tmp_path):
    evaluated(tmp_path, 0.99)
    ended(tmp_path, "running")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(wait_for_first_baseline(tmp_path, "t001")), daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    evaluated(tmp_path, 0.99, 0.3)
    thread.join(timeout=5)
    assert found == [""]
