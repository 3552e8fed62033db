"""The training loop on a real DeepSpeed engine: what it logs, writes, resumes and refuses."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cbtrain.data.batches import step_batches
from cbtrain.losses.schedule import coefficients, learning_rate
from cbtrain.model.loading import load_base
from cbtrain.model.lora import add_adapter
from cbtrain.training import loop
from cbtrain.training.loop import train
from cbtrain.training.non_finite import NonFiniteLossError
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils.environment import quiet_libraries

REQUIRED = {
    *("step", "loss", "loss_reroute", "loss_retain", "loss_kl", "cs", "cr", "alpha", "beta_kl", "kl_temperature"),
    *("kl_weight", "grad_norm_total", "lr", "tokens_per_s"),
}
LOSSES = ("loss", "loss_reroute", "loss_retain", "loss_kl", "grad_norm_total")


def lines_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    a, b = adapter_of(first), adapter_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(config, directory: Path, **kwargs) -> list[dict]:
    train(config, directory, lambda _metrics: None, **kwargs)
    return lines_of(directory)


def test_every_logged_step_has_all_metrics_and_evaluations_come_when_due(small_config, tmp_path):
    reported = []
    final = train(small_config, tmp_path, reported.append)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line.keys() >= REQUIRED for line in lines)
    assert ["eval_benign_kl" in line for line in lines] == [False, True, False, True]
    assert [metrics["step"] for metrics in reported] == [1, 2, 3, 4]
    assert final["step"] == 4
    assert final["train_s"] > 0
    assert all(line["scored_tokens_harmful"] > 0 for line in lines)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 4


def test_time_spent_in_reporting_is_not_counted_as_training(small_config, tmp_path):
    started = time.perf_counter()
    final = train(small_config, tmp_path, lambda _metrics: time.sleep(0.5))
    # The last report comes after the clock was read.
    assert final["train_s"] + final["eval_s"] <= time.perf_counter() - started - 4 * 0.5, final


def test_kl_is_logged_without_a_kl_weight(small_config, tmp_path):
    lines = run(replace(small_config, beta_kl=0.0), tmp_path)
    assert all(line["kl_weight"] == 0.0 for line in lines)
    assert lines[-1]["loss_kl"] > 0


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(small_config, tmp_path):
    for line in run(small_config, tmp_path):
        parts = line["cs"] * line["loss_reroute"] + line["cr"] * line["loss_retain"]
        assert line["loss"] == pytest.approx(parts + line["kl_weight"] * line["loss_kl"], rel=1e-5)


def test_two_runs_in_one_process_are_bit_identical_and_leave_the_base_alone(small_config, tmp_path):
    before = {name: value.clone() for name, value in load_base(small_config).state_dict().items()}
    run(small_config, tmp_path / "a")
    run(replace(small_config, seed=5), tmp_path / "b")
    run(small_config, tmp_path / "c")
    assert same_weights(tmp_path / "a", tmp_path / "c")
    assert not same_weights(tmp_path / "a", tmp_path / "b")
    after = load_base(small_config).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_agree_with_stage_1(small_config, tmp_path, stage):
    config = replace(small_config, weight_decay=0.1)
    reference, other = run(config, tmp_path / "1"), run(replace(config, zero_stage=stage), tmp_path / "n")
    for ours, theirs in zip(other, reference, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (stage, ours["step"], name)
    first, second = adapter_of(tmp_path / "1"), adapter_of(tmp_path / "n")
    assert first.keys() == second.keys()
    apart = max((first[name] - second[name]).abs().max().item() for name in first)
    assert apart < 1e-5, apart


def test_an_update_is_adamw_on_clipped_gradients_at_the_scheduled_rate(small_config, tmp_path):
    """Three steps of the engine against the same three written out with plain PyTorch."""
    config = replace(small_config, steps=3, warmup_steps=2, max_grad_norm=0.05, weight_decay=0.3, lr_schedule="linear")
    lines = run(config, tmp_path)
    assert lines[-1]["grad_norm_total"] > config.max_grad_norm, "clipping was not in force"

    data, pad = loop.prepare(config)
    model = add_adapter(load_base(config), config)
    step_module = CircuitBreakerStep(model, config)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), weight_decay=config.weight_decay)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        (batch,), counts = step_batches(data, config, step, pad)
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)  # also of what a step's losses do not reach
        step_module(batch, counts, coefficients(config, step)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), config.max_grad_norm)
        assert lines[step]["grad_norm_total"] == pytest.approx(norm.item(), rel=1e-4)
        assert lines[step]["lr"] == learning_rate(config, step)
        optimizer.step()
    expected = {name.replace(".default", ""): parameter.detach() for name, parameter in named.items()}
    model.unload()
    written = adapter_of(tmp_path)
    assert written.keys() == expected.keys()
    apart = max((written[name] - expected[name]).abs().max().item() for name in expected)
    assert apart < 1e-6, apart


def test_accumulation_agrees_with_one_batch(small_config, tmp_path):
    whole, parts = run(small_config, tmp_path / "w"), run(replace(small_config, micro_batch_size=2), tmp_path / "p")
    for ours, theirs in zip(parts, whole, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (ours["step"], name)


def test_asked_micro_steps_are_those_that_their_rows_give(small_config, tmp_path):
    by_rows = run(replace(small_config, micro_batch_size=2), tmp_path / "rows")
    by_steps = run(replace(small_config, gradient_accumulation=4), tmp_path / "steps")
    assert [[line[name] for name in LOSSES] for line in by_steps] == [
        [line[name] for name in LOSSES] for line in by_rows
    ]


@pytest.mark.parametrize("hidden_states", ["early_exit", "output_hidden_states"])
@pytest.mark.parametrize("stage", [1, 3])
def test_activations_computed_again_give_the_same_run(small_config, tmp_path, hidden_states, stage):
    config = replace(small_config, lora_dropout=0.1, hidden_states=hidden_states, zero_stage=stage)
    kept = run(config, tmp_path / "kept")
    again = run(replace(config, gradient_checkpointing=True), tmp_path / "again")
    for name in LOSSES:
        assert [line[name] for line in again] == [line[name] for line in kept], name
    assert same_weights(tmp_path / "kept", tmp_path / "again")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_in_the_hosts_memory_makes_the_same_updates(small_config, tmp_path, stage):
    config = replace(small_config, zero_stage=stage)
    near, far = run(config, tmp_path / "near"), run(replace(config, cpu_offload=True), tmp_path / "far")
    for ours, theirs in zip(far, near, strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (ours["step"], name)


def test_bfloat16_is_close_to_float32(small_config, tmp_path):
    half, full = run(replace(small_config, dtype="bfloat16"), tmp_path / "h"), run(small_config, tmp_path / "f")
    for ours, theirs in zip(half, full, strict=True):
        for name in ("loss", "loss_reroute"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.05), (ours["step"], name)
    assert all(torch.isfinite(weight).all() for weight in adapter_of(tmp_path / "h").values())


def test_plain_peft_loads_the_adapter_with_the_trained_models_logits(small_config, tmp_path, monkeypatch):
    seen = {}
    save = loop.save_adapter
    input_ids = torch.arange(8, 20)[None]

    def spy(model, directory, config):
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids).logits
        save(model, directory, config)

    monkeypatch.setattr(loop, "save_adapter", spy)
    run(replace(small_config, lora_layers=(0, 1)), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(small_config.model, dtype=torch.float32)
    plain = base(input_ids).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids).logits
    assert torch.allclose(loaded, seen["logits"], atol=1e-5)
    assert not torch.allclose(loaded, plain, atol=1e-3)


@pytest.mark.parametrize(("stage", "cpu_offload"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_loss_that_is_not_finite_stops_before_the_update(small_config, tmp_path, monkeypatch, stage, cpu_offload):
    weights_after = {}
    coefficients_of, step_of = loop.coefficients, loop.train_step

    def explode(config, step):
        weights = coefficients_of(config, step)
        return replace(weights, cs=float("inf")) if step == 2 else weights

    def remember(engine, given, step):
        update = step_of(engine, given, step)
        weights_after[step] = [p.detach().clone() for p in engine.module.parameters() if p.requires_grad]
        return update

    monkeypatch.setattr(loop, "coefficients", explode)
    monkeypatch.setattr(loop, "train_step", remember)
    config = replace(small_config, steps=5, eval_every=0, log_every=10, zero_stage=stage, cpu_offload=cpu_offload)
    with pytest.raises(NonFiniteLossError, match=r"step 3: a loss is not finite \(loss inf"):
        train(config, tmp_path, lambda _metrics: None)
    assert sorted(weights_after) == [1, 2, 3, 4, 5], "found at the next reading, not sooner"
    assert not all(torch.equal(a, b) for a, b in zip(weights_after[1], weights_after[2], strict=True))
    for step in (3, 4, 5):
        assert all(torch.equal(a, b) for a, b in zip(weights_after[2], weights_after[step], strict=True)), step
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    assert [line["step"] for line in run(small_config, tmp_path)] == [1, 2, 3, 4]


def test_many_runs_in_one_process_hold_no_more_files_and_threads_than_the_last(small_config, tmp_path):
    held = []
    for run in range(4):
        quiet_libraries()  # as each trial does
        train(replace(small_config, steps=1, warmup_steps=0, eval_every=0), tmp_path / str(run), lambda _metrics: None)
        held.append([len(list(Path(f"/proc/self/{what}").iterdir())) for what in ("fd", "task")])
    assert held[1:] == [held[1]] * 3, "open files and threads by run"
