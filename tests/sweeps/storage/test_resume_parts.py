"""What resuming a sweep is made of: its journal and locks, its interrupted trials, flags and checksums."""

import dataclasses
import json
import os
import threading
import time

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from simulated import file_storage, next_trial, plan_of, world

from cbtrain.config import InputError
from cbtrain.training.metrics import Metrics
from sweeps import kl_ablation
from sweeps.execution.context import TrialContext
from sweeps.execution.training import _begin_or_go_on
from sweeps.reporting.console import resume_lines
from sweeps.runtime.placement import Workers
from sweeps.storage.lock import HeldError, held
from sweeps.storage.resume import find_trials, flags_to_keep, given_flags, mend_journal, recorded, wait_for_leftovers


def test_a_half_written_last_line_is_put_aside_and_a_stale_lock_taken_away(killed):
    torn = '{"op_code": 8, "worker_id": "a'
    with (killed.path / "study.log").open("a") as file:
        file.write(torn)
    os.symlink(killed.path / "study.log", killed.path / "study.log.lock")
    mend_journal(killed)
    assert (killed.path / "study.log.torn").read_text() == torn
    began = time.monotonic()
    plan = plan_of(6, file_storage(killed.path), baseline_seeds=3)
    spec = next_trial(plan)
    plan.tell(spec.trial_id, world(spec))
    assert time.monotonic() - began < 5, "waited for a lock that nobody holds"
    again = plan_of(6, JournalStorage(JournalFileBackend(str(killed.path / "study.log"))), baseline_seeds=3)
    assert [row["status"] for row in again.rows()] == ["completed"] * 3 + ["running"]


def test_sampler_and_early_stop_are_those_that_the_sweep_was_begun_with(killed):
    record = json.loads((killed.path / "sweep.json").read_text())
    record["settings"]["sampler"] = "tpe"
    begun = kl_ablation.SweepSettings(early_stop=True, sampler="tpe")
    record["flags"] = flags_to_keep(begun)
    (killed.path / "sweep.json").write_text(json.dumps(record))
    killed.read()
    settings, plan = recorded(killed, kl_ablation.SweepSettings(), ["--resume", "run"])
    assert (settings.early_stop, plan.sampler) == (True, "tpe")


def test_interrupted_trials_keep_their_ids_and_settings(killed):
    asked = plan_of(6, baseline_seeds=3)
    expected = [next_trial(asked) for _ in range(4)][2:]
    found = find_trials(killed, asked.settings)
    assert (found.ended, found.interrupted, found.done) == (("t000", "t001"), tuple(expected), False)
    again = plan_of(6, file_storage(killed.path), baseline_seeds=3)
    assert [next_trial(again).trial_id for _ in range(3)] == ["t002", "t003", "t004"]
    with pytest.raises(InputError, match="--num-samples 4: 5 trials were begun already; give 5 or more"):
        find_trials(killed, dataclasses.replace(asked.settings, num_samples=4))


def test_a_trial_that_is_still_trained_is_waited_for(killed, capsys, monkeypatch):
    lock = killed.trial("t002") / "lock"
    lock.parent.mkdir(parents=True)
    taken, ended = threading.Event(), threading.Event()

    def train():
        with held(lock):
            taken.set()
            ended.wait(0.5)
        ended.set()

    thread = threading.Thread(target=train)
    thread.start()
    assert taken.wait(5)
    with pytest.raises(HeldError, match=f":{os.getpid()}$"), held(lock):
        pass
    wait_for_leftovers(killed, ["t002", "t003"])
    assert ended.is_set()
    assert "which still trains t002" in capsys.readouterr().out
    thread.join()
    monkeypatch.setattr("sweeps.storage.resume.LEFT_RUNNING_S", 0)
    with held(lock), pytest.raises(InputError, match=r"run/trials/t002: .* still trains it; end that process"):
        wait_for_leftovers(killed, ["t002"])


@pytest.mark.parametrize("damage", ["none", "flip", "gone"])
def test_a_trial_without_a_good_checkpoint_begins_anew_and_says_so(small_config, tmp_path, capsys, damage):
    config = dataclasses.replace(small_config, checkpoint_every=2, eval_every=0)
    context = TrialContext(config, tmp_path, Workers())

    class Killed(Exception):
        pass

    def die_at_3(metrics: Metrics) -> None:
        if metrics["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        _begin_or_go_on(config, tmp_path, die_at_3, context)
    victim = next((tmp_path / "checkpoint").glob("step-2/*.pt"))
    if damage == "flip":
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    if damage == "gone":
        (tmp_path / "checkpoint" / "manifest.json").unlink()
    steps: list[float] = []
    final = _begin_or_go_on(config, tmp_path, lambda metrics: steps.append(metrics["step"]), context)
    assert steps == ([3, 4] if damage == "none" else [1, 2, 3, 4])
    assert final.get("resumed_from", 0) == (2 if damage == "none" else 0)
    assert ("begins anew: " in capsys.readouterr().out) == (damage != "none")


def test_flags_are_found_however_they_are_written():
    argv = ["--num_samples=30", "--resume", "runs/a", "--no-dry-run", "--config", "tiny", "--harmful", "a", "b"]
    assert given_flags(argv) == ["num_samples", "resume", "dry_run", "preset", "harmful"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], "resume    4 of 10 trials ended"),
        ([42], "resume    4 of 10 trials ended, 1 was interrupted: it goes on from step 42"),
        ([42, 21, 0], "4 of 10 trials ended, 3 were interrupted: they go on from step 42, step 21 and from the start"),
    ],
)
def test_the_line_on_what_was_found(steps, expected):
    lines = resume_lines(4, 10, steps, done=False)
    assert expected in " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= 80
