"""Two workers against one, in real processes: the same global batch gives the same losses, whoever holds what."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from causal_models import SHAPE
from safetensors.torch import load_file
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig
from two_workers import updates_of_half_unscored_rows
from worlds import config_on

from cbtrain.config import CircuitBreakerConfig
from cbtrain.model.loading import load_base
from cbtrain.training.loop import train

ROOT = Path(__file__).parents[3]
LOSSES = ("loss", "loss_reroute", "loss_retain", "loss_kl", "grad_norm_total")
JOBS: dict[str, tuple[dict[str, object], bool]] = {
    "ZeRO 1": ({"zero_stage": 1}, False),
    "ZeRO 2, two micro-steps": ({"zero_stage": 2, "gradient_accumulation": 2}, False),
    "ZeRO 3": ({"zero_stage": 3}, False),
    "ZeRO 3, teacher cache, blocks run again": ({"zero_stage": 3, "gradient_checkpointing": True}, True),
}
"""Fields of the configuration, and whether the teacher is recalled from a cache that the workers fill."""
STOPPED: dict[str, tuple[dict[str, object], bool]] = {
    "stopped, ZeRO 1": ({"zero_stage": 1}, False),
    "stopped, ZeRO 3, teacher cache": ({"zero_stage": 3}, True),
}
"""Of runs that end behind the checkpoint of step 2 and go on."""
LLAMA_4 = "ZeRO 3, Llama 4 against one worker that holds all weights"
EXPERTS = {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 8}
UNSCORED = [2, 3]
"""ZeRO stages at which a worker has no scored token."""


@pytest.fixture(scope="module")
def config(small_world) -> CircuitBreakerConfig:
    """Four steps of eight rows a side, without dropout, whose draws would differ."""
    return config_on(small_world, warmup_steps=1, eval_every=0)


@pytest.fixture(scope="module")
def llama4(config, small_world, tmp_path_factory) -> CircuitBreakerConfig:
    """The same world with a small mixture of experts in place of its model."""
    directory = tmp_path_factory.mktemp("llama4")
    tokenizer = AutoTokenizer.from_pretrained(small_world)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    shape = SHAPE | EXPERTS | {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.2}
    Llama4ForCausalLM(Llama4TextConfig(**shape)).save_pretrained(directory)
    return replace(config, model=str(directory), target_layers=(2, 3), lora_init_std=0.1)


@pytest.fixture(scope="module")
def by_two(config, llama4, tmp_path_factory) -> Path:
    """A directory for each job that two workers have done, all in one start of them."""
    directory = tmp_path_factory.mktemp("by_two")
    jobs = [
        job(replace(config, **fields), directory / name, cache=directory / "cache" if cached else None)
        for name, (fields, cached) in JOBS.items()
    ]
    jobs.append(job(replace(llama4, zero_stage=3), directory / LLAMA_4))
    jobs += [job(replace(config, zero_stage=n), directory / f"unscored-{n}.json", unscored=True) for n in UNSCORED]
    jobs.append(job(replace(config, lr=1e30), directory / "diverged"))
    jobs += stopped_jobs(config, directory)
    (directory / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "tests" / "helpers" / "two_workers.py"
    done = subprocess.run(
        [*command, str(script), str(directory / "jobs.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def job(config: CircuitBreakerConfig, output: Path, *, cache: Path | None = None, **how: object) -> dict:
    what = {"unscored": False, "stop_at": None, "asked": False, "resume": False} | how
    return {"config": dataclasses.asdict(config), "output": str(output), "cache": cache and str(cache), **what}


def stopped_jobs(config: CircuitBreakerConfig, directory: Path) -> list[dict]:
    """For each of `STOPPED` a run that never stops, and one that ends behind a checkpoint, goes on, is asked to stop on
    its second worker alone at step 3, and goes on."""
    jobs = []
    for name, (fields, cached) in STOPPED.items():
        run = replace(config, checkpoint_every=2, eval_every=2, lora_dropout=0.1, **fields)
        cache = directory / f"{name} cache" if cached else None
        jobs.append(job(run, directory / f"{name}, whole", cache=cache))
        jobs.append(job(run, directory / f"{name}, cut", cache=cache, stop_at=3))
        jobs.append(job(run, directory / f"{name}, cut", cache=cache, asked=True, resume=True))
        jobs.append(job(run, directory / f"{name}, cut", cache=cache, resume=True))
    return jobs


def lines_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", JOBS)
def test_two_workers_agree_with_one_in_every_loss_at_every_step(config, by_two, tmp_path, name):
    fields, cached = JOBS[name]
    alone = replace(config, **fields)
    if alone.gradient_accumulation:
        alone = replace(alone, gradient_accumulation=2 * alone.gradient_accumulation)  # the same rows at a time
    train(alone, tmp_path, lambda _metrics: None, teacher_cache=tmp_path / "cache" if cached else None)
    assert disagreements(lines_of(by_two / name), lines_of(tmp_path)) == []


def disagreements(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> list[tuple]:
    """Step, metric and both values wherever a loss differs; both have the same steps and metrics, and moved."""
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    assert any(line["loss_reroute"] < 0.999 for line in ours), "nothing moved, so nothing was compared"
    found = []
    for line, reference in zip(ours, theirs, strict=True):
        held_out = {key for key in reference if key.startswith(("eval_", "base_")) and not key.endswith("_s")}
        assert held_out <= line.keys()
        for metric in (*LOSSES, *held_out):
            if line[metric] != pytest.approx(reference[metric], rel=1e-5, abs=1e-5):
                found.append((line["step"], metric, line[metric], reference[metric]))
    return found


def test_two_workers_with_a_part_of_the_experts_each_agree_with_one_that_has_them_all(llama4, by_two, tmp_path):
    train(replace(llama4, zero_stage=1), tmp_path, lambda _metrics: None)
    assert disagreements(lines_of(by_two / LLAMA_4), lines_of(tmp_path)) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells mapped files by Linux's /proc")
def test_weights_in_their_own_dtype_are_mapped_from_their_file_and_not_copied(llama4):
    """So the workers of a node share them through its page cache until ZeRO-3 has given each its part."""
    base = load_base(llama4)
    file = str(Path(llama4.model) / "model.safetensors")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    copied = [
        name
        for name, parameter in base.named_parameters()
        if not any(low <= parameter.data_ptr() < high for low, high in mapped)
    ]
    assert not copied
    in_other_dtype = load_base(replace(llama4, dtype="bfloat16")).lm_head.weight.data_ptr()
    assert not any(low <= in_other_dtype < high for low, high in mapped)


def test_both_workers_fill_the_teacher_cache(by_two):
    assert len(list((by_two / "cache").glob("*/*.safetensors"))) > 1


@pytest.mark.parametrize("name", STOPPED)
def test_two_workers_that_go_on_are_bit_for_bit_two_that_never_stopped(by_two, name):
    cut, whole = by_two / f"{name}, cut", by_two / f"{name}, whole"
    kept = sorted(path.name for path in (cut / "checkpoint" / "step-3").iterdir())
    assert {"random_state_0.pt", "random_state_1.pt"} <= set(kept)
    numbers = [
        [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines_of(directory)]
        for directory in (cut, whole)
    ]
    assert len(numbers[0]) == 4
    assert numbers[0] == numbers[1]
    ours, theirs = (load_file(directory / "adapter" / "adapter_model.safetensors") for directory in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[weight], theirs[weight]) for weight in ours)


def test_the_rows_of_a_loss_that_was_not_finite_are_told_by_worker(by_two):
    record = json.loads((by_two / "diverged" / "non_finite.json").read_text())
    assert (record["workers"], record["losses"]["loss"]) == (2, "nan")
    assert [batch["rank"] for batch in record["batches"]] == [0, 1]
    rows = [row for batch in record["batches"] for row in batch["benign"]]
    assert len({row.rpartition(":")[0] for row in rows}) == 1
    assert len(set(rows)) == 8
    assert not (by_two / "diverged" / "adapter").exists()


@pytest.mark.parametrize("stage", UNSCORED)
def test_a_worker_without_a_scored_token_takes_part_in_the_update(config, by_two, stage):
    alone = updates_of_half_unscored_rows(replace(config, zero_stage=stage))
    ours = json.loads((by_two / f"unscored-{stage}.json").read_text())
    for update, reference in zip(ours, alone, strict=True):
        assert update == pytest.approx(reference, rel=1e-5, abs=1e-5)
    assert min(alone[0]) > 0, "the scored rows give every loss and a gradient"
