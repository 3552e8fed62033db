"""A run that recalls its teacher: from a cache that is right, or, where there can be none, from the live teacher."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbtrain.config import CircuitBreakerConfig, get_config
from cbtrain.model.checks import prepare
from cbtrain.model.loading import forget_base, resolve
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache import plan
from cbtrain.teacher_cache.plan import plan_cache
from cbtrain.training import loop
from cbtrain.training.loop import run_teacher, train

EVALUATED = ("eval_loss_reroute", "eval_loss_retain", "eval_benign_kl", "eval_benign_nll", "eval_harmful_nll")


def run(config: CircuitBreakerConfig, directory: Path, cache: Path | None) -> dict[str, float]:
    return train(config, directory, lambda _metrics: None, teacher_cache=cache)


def rows_of(config: CircuitBreakerConfig) -> int:
    data, _ = prepare(config)
    return sum(len(side.train) + len(side.held_out) for side in (data.harmful, data.benign))


@pytest.fixture
def teacher_calls(monkeypatch) -> list[int]:
    """Rows of every pass of the live teacher alone, as the cache asks for it."""
    calls: list[int] = []
    real = Decoder.teacher

    def counted(self, batch, layers, final):
        calls.append(len(batch.rows))
        return real(self, batch, layers, final)

    monkeypatch.setattr(Decoder, "teacher", counted)
    return calls


@pytest.mark.parametrize("retain_layers", ["target", "all"])
def test_a_run_is_the_same_with_and_without_the_cache(small_config, tmp_path, retain_layers):
    config = replace(small_config, steps=12, lora_init_std=0.05, retain_layers=retain_layers)
    live, cached = run(config, tmp_path / "live", None), run(config, tmp_path / "cached", tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*/*.safetensors")), "there was no cache"
    for name in (*EVALUATED, "base_harmful_nll", "base_benign_nll", "loss", "loss_kl"):
        assert cached[name] == pytest.approx(live[name], rel=1e-4), name
    assert cached["eval_loss_reroute"] < 0.99, "nothing was trained"


def test_the_first_run_fills_the_cache_and_the_next_run_no_teacher(small_config, tmp_path, teacher_calls):
    run(small_config, tmp_path / "a", tmp_path / "cache")
    assert sum(teacher_calls) == rows_of(small_config)
    teacher_calls.clear()
    run(replace(small_config, seed=3, beta_kl=1.0, batch_size=4), tmp_path / "b", tmp_path / "cache")
    assert teacher_calls == []


def test_filled_beforehand_it_serves_the_run_and_tells_what_it_took(small_config, tmp_path, teacher_calls):
    done: list[int] = []
    rows, seconds, _ = run_teacher(small_config, tmp_path / "cache", done.append)
    assert rows == sum(done) == sum(teacher_calls) == rows_of(small_config)
    assert seconds > 0
    teacher_calls.clear()
    assert run_teacher(small_config, tmp_path / "cache") == (0, 0.0, None)
    run(small_config, tmp_path / "a", tmp_path / "cache")
    assert teacher_calls == []


def change_one_row(config: CircuitBreakerConfig, directory: Path) -> CircuitBreakerConfig:
    first, *others = Path(config.benign[0]).read_text().splitlines()
    row = json.loads(first)
    row["messages"][1]["content"] = "first " + row["messages"][1]["content"]
    changed = directory / "changed.jsonl"
    changed.write_text("\n".join([json.dumps(row), *others]) + "\n")
    return replace(config, benign=(str(changed),))


@pytest.mark.parametrize(
    ("change", "rows_run"),
    [
        (change_one_row, 1),
        (lambda config, _: replace(config, dtype="bfloat16"), None),
        (lambda config, _: replace(config, target_layers=(1, 3)), None),
        (lambda config, _: replace(config, mask_policy="full_sequence"), None),
        (lambda config, _: replace(config, max_length=8), None),
    ],
    ids=["one row of the data", "dtype", "layers", "mask policy", "max length"],
)
def test_what_changes_the_teachers_states_is_computed_anew(small_config, tmp_path, teacher_calls, change, rows_run):
    run(small_config, tmp_path / "a", tmp_path / "cache")
    teacher_calls.clear()
    changed = change(small_config, tmp_path)
    cached = run(changed, tmp_path / "b", tmp_path / "cache")
    assert sum(teacher_calls) == rows_run if rows_run else sum(teacher_calls) > 0
    live = run(changed, tmp_path / "c", None)
    tolerance = 0.02 if changed.dtype == "bfloat16" else 1e-4
    for name in ("eval_loss_reroute", "eval_benign_nll", "base_benign_nll"):
        assert cached[name] == pytest.approx(live[name], rel=tolerance), name


def test_a_shard_damaged_between_runs_is_computed_anew(small_config, tmp_path, teacher_calls):
    expected = run(small_config, tmp_path / "a", tmp_path / "cache")
    (shard, *_) = (tmp_path / "cache").glob("*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0x40
    shard.write_bytes(bytes(content))
    teacher_calls.clear()
    found = run(small_config, tmp_path / "b", tmp_path / "cache")
    assert 0 < sum(teacher_calls) < rows_of(small_config)
    assert {name: found[name] for name in EVALUATED} == {name: expected[name] for name in EVALUATED}


def test_a_disk_that_is_too_small_leaves_the_live_teacher_and_says_why(small_config, tmp_path, monkeypatch, capsys):
    expected = run(small_config, tmp_path / "a", None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    found = run(small_config, tmp_path / "b", tmp_path / "cache")
    assert {name: found[name] for name in EVALUATED} == {name: expected[name] for name in EVALUATED}
    said = capsys.readouterr().err
    assert said.count("teacher cache") == 1
    assert "needs" in said
    assert "1.0 kB are free; every step runs the teacher" in said
    assert not list((tmp_path / "cache").glob("*/*.safetensors"))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_meanwhile_leaves_the_live_teacher_and_no_shard(
    small_config, tmp_path, small_disk, monkeypatch, capsys
):
    """The estimate is made to promise room, as it does where something else is writing too."""
    monkeypatch.setattr(plan.CacheEstimate, "require_room", lambda *_: None)
    found = run(small_config, tmp_path / "a", small_disk / "cache")
    assert found["step"] == small_config.steps
    assert "No space left on device; every step runs the teacher" in capsys.readouterr().err
    assert not list(small_disk.rglob("*.safetensors"))
    assert not list(small_disk.rglob("*.tmp"))


@pytest.mark.parametrize("place", ["a file", "read only"])
def test_a_place_that_cannot_be_written_leaves_the_live_teacher(small_config, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache" if place == "a file" else Path("/proc/cache")
    assert run(small_config, tmp_path / "a", cache)["step"] == small_config.steps
    assert "every step runs the teacher" in capsys.readouterr().err


def test_zero_3_fills_and_reads_the_cache_as_stage_1_does(small_config, tmp_path, teacher_calls):
    partitioned = replace(small_config, zero_stage=3)
    assert run_teacher(partitioned, tmp_path / "cache")[0] == rows_of(small_config)
    teacher_calls.clear()
    expected = run(small_config, tmp_path / "a", tmp_path / "cache")
    found = run(partitioned, tmp_path / "b", tmp_path / "cache")
    assert teacher_calls == []
    for name in EVALUATED:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_head_that_zero_3_has_partitioned_is_gathered(small_config, tmp_path, monkeypatch):
    """Small parameters it leaves whole, so it is told to leave none."""
    initialize = loop.deepspeed.initialize

    def partition_all(**arguments):
        arguments["config"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(**arguments)

    expected = run(small_config, tmp_path / "a", None)
    monkeypatch.setattr(loop.deepspeed, "initialize", partition_all)
    found = run(replace(small_config, zero_stage=3), tmp_path / "b", None)
    for name in ("loss", "loss_kl", *EVALUATED):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert torch.isfinite(torch.tensor(found["loss"]))


def test_a_whole_trial_is_the_same_within_a_tenth_of_the_seed_noise(tmp_path):
    """Of the embedded default; bench_tiny_world's table has the noise: σ ≥ 0.0029 of reroute, ≥ 0.10 of drift."""
    config = resolve(get_config("tiny", beta_kl=0.3))
    live, cached = run(config, tmp_path / "live", None), run(config, tmp_path / "cached", tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*/*.safetensors")), "there was no cache"
    assert cached["eval_loss_reroute"] == pytest.approx(live["eval_loss_reroute"], abs=0.00029)
    assert cached["eval_benign_kl"] == pytest.approx(live["eval_benign_kl"], abs=0.01)
    for name in live:
        if name.startswith("eval_") and name != "eval_s":
            assert cached[name] == pytest.approx(live[name], rel=0.01, abs=1e-3), name


def test_weights_replaced_between_runs_of_one_process_are_read_anew(small_config, small_world, tmp_path, teacher_calls):
    model = Path(shutil.copytree(small_world, tmp_path / "model"))
    config = replace(small_config, model=str(model))
    run(config, tmp_path / "a", tmp_path / "cache")
    weights = load_file(model / "model.safetensors")
    save_file({name: 1.3 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    teacher_calls.clear()
    cached = run(config, tmp_path / "b", tmp_path / "cache")
    assert sum(teacher_calls) == rows_of(config)
    forget_base()
    live = run(config, tmp_path / "c", None)
    for name in (*EVALUATED, "base_benign_nll"):
        assert cached[name] == pytest.approx(live[name], rel=1e-4), name


def test_a_full_cache_needs_no_room(small_config, tmp_path, monkeypatch, teacher_calls):
    run_teacher(small_config, tmp_path / "cache")
    teacher_calls.clear()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    data, _ = prepare(small_config)
    assert plan_cache(str(tmp_path / "cache"), tmp_path, small_config, data, 20).directory == tmp_path / "cache"
    run(small_config, tmp_path / "a", tmp_path / "cache")
    assert teacher_calls == []
