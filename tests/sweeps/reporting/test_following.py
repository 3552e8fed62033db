"""What trials that run have logged is read as it comes."""

import json
import os
from pathlib import Path

from sweeps.reporting.following import Follower, Latest


def line(step: int, **evaluated: float) -> str:
    return json.dumps({"step": step, "loss": 9.5, **evaluated}) + "\n"


def test_steps_and_held_out_values_are_read_as_they_come_half_lines_included(tmp_path: Path) -> None:
    follower, path = Follower(tmp_path), tmp_path / "t000" / "metrics.jsonl"
    assert follower.latest("t000") == Latest(), "no file"
    path.parent.mkdir()
    path.write_text(line(1) + line(2, eval_loss_reroute=0.5, eval_benign_kl=1.25) + line(3)[:12])
    assert follower.latest("t000") == Latest(2, 0.5, 1.25)
    with path.open("a") as file:
        file.write(line(3)[12:] + line(4))
    assert follower.latest("t000") == Latest(4, 0.5, 1.25)


def test_only_what_was_added_is_read(tmp_path: Path) -> None:
    follower, path = Follower(tmp_path), tmp_path / "t000" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(line(1, eval_loss_reroute=0.5, eval_benign_kl=1.25))
    follower.latest("t000")
    with path.open("r+") as file:  # in place, at its old length: nobody looks there again
        file.write(line(9, eval_loss_reroute=0.9, eval_benign_kl=1.25))
    with path.open("a") as file:
        file.write(line(2))
    assert follower.latest("t000") == Latest(2, 0.5, 1.25)


def test_a_trial_that_begins_anew_is_read_anew_and_damage_is_passed_over(tmp_path: Path) -> None:
    follower, path = Follower(tmp_path), tmp_path / "t000" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(line(1) + line(2, eval_loss_reroute=0.5, eval_benign_kl=1.25))
    follower.latest("t000")
    other = tmp_path / "other"
    other.write_text(line(1) + "x" * 500 + "\n")
    os.replace(other, path)
    assert follower.latest("t000").reroute is None
    with path.open("a") as file:
        file.write(line(2) + '{"step": "none"}\n[1]\n' + line(3))
    assert follower.latest("t000") == Latest(3)
