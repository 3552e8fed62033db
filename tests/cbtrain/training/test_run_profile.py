"""The profile of a run: what it counts, that it changes no number, and that it is off unless asked for."""

import json
import time

import pytest

from cbtrain.training.loop import train
from cbtrain.utils.profile import KINDS, OFF, Profile


def nothing(_metrics: dict[str, float]) -> None:
    """Report to nobody."""


def test_of_spans_within_spans_the_inner_one_counts_and_the_rest_is_other(tmp_path):
    profile = Profile()
    with profile.span("forward_benign"):
        time.sleep(0.02)
        with profile.span("kl"):
            time.sleep(0.03)
    time.sleep(0.01)
    assert list(profile.each("data", (time.sleep(0.01) or item for item in range(3)))) == [0, 1, 2]
    profile.write(tmp_path / "profile.json", steps=4)
    record = json.loads((tmp_path / "profile.json").read_text())
    seconds = record["seconds"]
    assert record["steps"] == 4
    assert set(seconds) == {*KINDS, "other", "total"}
    least = {"forward_benign": 0.02, "kl": 0.03, "data": 0.03, "other": 0.01}
    assert all(seconds[kind] >= value for kind, value in least.items()), seconds
    assert seconds["kl"] < seconds["total"] - seconds["forward_benign"]
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"])


def test_a_profiled_run_has_the_same_numbers_and_every_kind_of_work(small_config, tmp_path):
    plain = train(small_config, tmp_path / "plain", nothing)
    profiled = train(small_config, tmp_path / "profiled", nothing, profile=Profile())
    timed = {"train_s", "eval_s", "tokens_per_s"}
    assert {name: value for name, value in plain.items() if name not in timed} == {
        name: value for name, value in profiled.items() if name not in timed
    }
    seconds = json.loads((tmp_path / "profiled" / "profile.json").read_text())["seconds"]
    assert all(seconds[kind] > 0 for kind in KINDS), seconds
    assert not (tmp_path / "plain" / "profile.json").exists()


def test_a_run_without_a_profile_leaves_none_of_an_earlier_one(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text("{}")
    with OFF.span("kl"):
        pass
    assert list(OFF.each("data", [1, 2])) == [1, 2]
    OFF.write(path, 4)
    assert not path.exists()
    assert set(OFF.seconds.values()) == {0.0}
