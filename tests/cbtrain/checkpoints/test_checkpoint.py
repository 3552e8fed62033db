"""Checkpoints: going on is never having stopped, a torn one costs the steps since the one before, and whose it is."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbtrain.checkpoints.checkpoint import Checkpoints
from cbtrain.checkpoints.manifest import MANIFEST, NOTHING, CheckpointError, Progress, progress_of
from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.model.checks import prepare
from cbtrain.training.engine import adapted_model, deepspeed_engine
from cbtrain.training.loop import train
from cbtrain.training.metrics import Metrics
from cbtrain.utils import distributed
from cbtrain.utils.profile import Profile
from cbtrain.utils.stopping import Interrupted


class StopError(Exception):
    """A run's process is gone."""


def stop_at(step: int) -> Callable[[Metrics], None]:
    """A report that ends the run at a step."""

    def report(metrics: Metrics) -> None:
        if metrics["step"] == step:
            raise StopError

    return report


def ignored(_metrics: Metrics) -> None:
    """A report to nobody."""


def lines_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def untimed(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl without seconds."""
    return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in lines_of(directory)]


def same_run(first: Path, second: Path) -> bool:
    """Whether two runs logged the same numbers and left the same weights, bit for bit."""
    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (first, second))
    same_weights = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return same_weights and untimed(first) == untimed(second)


def stopped(config: CircuitBreakerConfig, directory: Path, step: int, **kwargs) -> Path:
    """The directory of a run that was ended at a step; where its checkpoints are."""
    with pytest.raises(StopError):
        train(config, directory, stop_at(step), **kwargs)
    return directory / "checkpoint"


@pytest.fixture
def config(small_config) -> CircuitBreakerConfig:
    """Six steps with dropout, warm-up, decay and evaluations, a checkpoint after each second."""
    return replace(small_config, steps=6, checkpoint_every=2, lora_dropout=0.1, warmup_steps=1)


WAYS: dict[str, tuple[dict[str, object], bool]] = {
    "plain": ({}, False),
    "teacher cache": ({}, True),
    "ZeRO 2, accumulated": ({"zero_stage": 2, "gradient_accumulation": 2}, False),
    "ZeRO 3, teacher cache, blocks run again": ({"zero_stage": 3, "gradient_checkpointing": True}, True),
    "relative norms, cosine, ramp": (
        {
            **{"retain_norm": "relative", "coefficient_schedule": "cosine", "beta_kl_schedule": "ramp"},
            **{"zero_stage": 0, "log_every": 4, "eval_every": 1},
        },
        False,
    ),
}
"""Fields of the configuration, and whether the teacher is recalled from a cache; `test_workers.py` has two workers."""


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_is_bit_for_bit_one_that_never_stopped(config, tmp_path, way):
    fields, cached = WAYS[way]
    config = replace(config, **fields)
    cache = {"teacher_cache": tmp_path / "cache"} if cached else {}
    whole = train(config, tmp_path / "whole", ignored, **cache)
    kept = stopped(config, tmp_path / "cut", 5, **cache)
    taken = json.loads((kept / MANIFEST).read_text())["seconds"]
    final = train(config, tmp_path / "cut", ignored, resume=True, profile=Profile(), **cache)
    assert (final["resumed_from"], final["earlier_s"]) == (4, sum(taken.values()))
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    assert "converged" in final
    assert final["converged"] == whole["converged"]
    assert taken["train"] < lines_of(tmp_path / "cut")[-1]["train_s"]
    assert json.loads((tmp_path / "cut" / "profile.json").read_text())["steps"] == 2


def test_a_run_stopped_twice_is_bit_for_bit_one_that_never_stopped(config, tmp_path):
    train(config, tmp_path / "whole", ignored)
    stopped(config, tmp_path / "cut", 3)
    stopped(config, tmp_path / "cut", 5, resume=True)
    train(config, tmp_path / "cut", ignored, resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def asked_from(nth: int) -> Callable[[], bool]:
    """Holds from the nth time on that a run asks whether it shall stop."""
    left = iter(range(nth))
    return lambda: next(left, None) is None


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_there_and_goes_on_bit_for_bit(config, tmp_path):
    """At every place at which it asks, without checkpoints of its own: behind updates and within evaluations."""
    config = replace(config, checkpoint_every=0, steps=3, eval_every=2, log_every=3)
    whole = train(config, tmp_path / "whole", ignored)
    stopped_behind = []
    for nth in range(100):
        run = tmp_path / f"cut-{nth}"
        try:
            train(config, run, ignored, stop=asked_from(nth))
        except Interrupted as stop:
            stopped_behind.append(stop.step)
        else:
            break
        assert progress_of(run / "checkpoint", config, 1).step == stopped_behind[-1]
        with pytest.raises(Interrupted):  # at the first place at which the resumed run asks, which may be the same
            train(config, run, ignored, resume=True, stop=asked_from(0))
        final = train(config, run, ignored, resume=True)
        assert same_run(tmp_path / "whole", run), nth
        assert [type(value) for value in final.values()][:1] == [int]
        assert final["converged"] == whole["converged"]
    within = [step for step in set(stopped_behind) if stopped_behind.count(step) > 1]
    assert (set(stopped_behind), within) == ({1, 2, 3}, [2, 3]), stopped_behind


def steps_kept(directory: Path) -> list[str]:
    """The directories in it."""
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def damage(file: Path, how: str, at: float) -> None:
    content = bytearray(file.read_bytes())
    place = int(at * (len(content) - 1))
    if how == "cut short":
        del content[place:]
    else:
        content[place] ^= 1 << place % 8
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut short", "a bit flipped"])
def test_a_torn_checkpoint_is_skipped_for_the_one_before(config, tmp_path, capsys, how):
    train(config, tmp_path / "whole", ignored)
    kept = stopped(config, tmp_path / "run", 5)
    assert steps_kept(kept) == ["step-2", "step-4"]
    whole, draw = tmp_path / "kept", random.Random(how)
    shutil.copytree(kept, whole)
    assert progress_of(kept, config, 1).step == 4
    victims = [kept / MANIFEST, *sorted((kept / "step-4").iterdir())]
    for victim in victims:
        for at in (0.0, 1.0, *(draw.random() for _ in range(5))):
            damage(victim, how, at)
            assert progress_of(kept, config, 1).step == 2, (victim, at)
            shutil.copy(whole / victim.relative_to(kept), victim)
    damage(victims[-1], how, draw.random())
    final = train(config, tmp_path / "run", ignored, resume=True)
    assert final["resumed_from"] == 2
    said = capsys.readouterr().err
    assert f"checkpoint skipped: {victims[-1]}: missing or changed since it was written; the run goes on from" in said
    assert same_run(tmp_path / "whole", tmp_path / "run")


def test_where_both_are_torn_nothing_is_loaded(config, tmp_path):
    kept = stopped(config, tmp_path, 5)
    damage(next((kept / "step-4").iterdir()), "cut short", 0.5)
    damage(next((kept / "step-2").iterdir()), "cut short", 0.5)
    with pytest.raises(CheckpointError, match=f"changed since it was written; remove {kept} to start anew"):
        train(config, tmp_path, ignored, resume=True)


def test_two_checkpoints_are_kept_and_a_run_that_begins_anew_removes_them(config, tmp_path):
    kept = stopped(replace(config, checkpoint_every=1), tmp_path, 6)
    assert steps_kept(kept) == ["step-4", "step-5"]
    stopped(config, tmp_path, 3)
    assert steps_kept(kept) == ["step-2"]
    assert progress_of(kept, config, 1).step == 2


def test_a_run_ended_at_any_moment_of_a_save_has_a_whole_checkpoint(small_config, tmp_path, monkeypatch):
    """Every call that changes the disk fails once, in turn; what it had left is resumed from and saved over."""
    config = replace(small_config, checkpoint_every=1)
    data, _ = prepare(config)
    left: list[int] = []
    with distributed.process_group(), adapted_model(config) as model, deepspeed_engine(model, config) as engine:

        def save(kept: Checkpoints, step: int) -> None:
            kept.save(engine, Progress(step, {"train": 1.0}))

        calls = [(os, "fsync"), (os, "replace"), (Path, "rename"), (shutil, "rmtree"), (torch, "save")]
        for place, name in calls:
            for nth in range(100):
                directory = tmp_path / f"{name}-{nth}"
                kept = Checkpoints(directory, config, data)
                kept.begin()
                save(kept, 1)
                save(kept, 2)
                with monkeypatch.context() as patched:
                    made = failing(getattr(place, name), nth)
                    patched.setattr(place, name, made)
                    try:
                        save(kept, 3)
                    except StopError:
                        pass
                    else:
                        assert nth > 0, f"{name} is never called"
                        break
                found = progress_of(directory, config, 1).step
                assert found in (2, 3), (name, nth)
                left.append(found)
                assert kept.load(engine).step == found
                save(kept, 4)
                assert progress_of(directory, config, 1).step == 4, (name, nth)
                assert steps_kept(directory) == [f"step-{found}", "step-4"]
                shutil.rmtree(directory)
    assert {2, 3} <= set(left), "no moment before and after the new one counts"


def failing(call: Callable, nth: int) -> Callable:
    """The call, which ends the process in place of its nth time."""
    calls = iter(range(nth + 1))

    def made(*args, **kwargs):
        if next(calls) == nth:
            raise StopError
        return call(*args, **kwargs)

    return made


def test_resuming_without_a_checkpoint_is_refused_and_leaves_the_run_alone(small_config, tmp_path):
    train(small_config, tmp_path, ignored)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        train(replace(small_config, lr=1e-5), tmp_path, ignored, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def other_weights(world: Path) -> None:
    weights = load_file(world / "model.safetensors")
    name = max(weights)
    weights[name] = weights[name] * 1.001
    save_file(weights, world / "model.safetensors", metadata={"format": "pt"})


def other_row(world: Path) -> None:
    file = world / "benign.jsonl"
    file.write_text(file.read_text().replace("carry", "bring"))


def other_template(world: Path) -> None:
    found = list(world.glob("*.jinja")) or [world / "tokenizer_config.json"]
    found[0].write_text(found[0].read_text() + "\n")  # the rows' tokens stay


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_weights, r"model\.safetensors \(model\): changed since \S+ was written; put it back"),
        (other_row, r"benign\.jsonl \(data\): changed since \S+ was written; put it back"),
        (other_template, r"(jinja|json) \(.*chat template\): changed since \S+ was written; put it back"),
    ],
)
def test_a_run_with_another_model_data_or_template_does_not_go_on(config, small_world, tmp_path, change, said):
    world = tmp_path / "world"
    shutil.copytree(small_world, world)
    files = {side: (str(world / f"{side}.jsonl"),) for side in ("harmful", "benign")}
    config = replace(config, model=str(world), **files)
    kept = stopped(config, tmp_path / "run", 3)
    assert progress_of(kept, config, 1).step == 2
    change(world)
    with pytest.raises(CheckpointError, match=said):
        train(config, tmp_path / "run", ignored, resume=True)
    assert progress_of(kept, config, 1) == NOTHING


def test_a_run_with_other_settings_rows_or_workers_does_not_go_on(config, tmp_path, monkeypatch):
    kept = stopped(config, tmp_path, 3)
    other = r"written by a run with --lr 0.0015, and this run has 1.0; start in another directory"
    with pytest.raises(CheckpointError, match=other):
        train(replace(config, lr=1.0), tmp_path, ignored, resume=True)
    assert progress_of(kept, config, 2).step == 0
    monkeypatch.setitem(prepare(config)[0].__dict__, "fingerprint", "of what a newer library makes of the same files")
    with pytest.raises(CheckpointError, match="the rows' tokens are not those of"):
        train(config, tmp_path, ignored, resume=True)


def test_a_run_goes_on_with_a_smaller_micro_batch(config, tmp_path):
    config = replace(config, lora_dropout=0.0)
    train(config, tmp_path / "whole", ignored)
    stopped(config, tmp_path / "cut", 5)
    smaller = replace(config, micro_batch_size=4, gradient_accumulation=2)
    assert train(smaller, tmp_path / "cut", ignored, resume=True)["resumed_from"] == 4
    for ours, theirs in zip(untimed(tmp_path / "cut"), untimed(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
