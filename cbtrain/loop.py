"""The training loop: a DeepSpeed engine around the step, held-out evaluation, checkpoints, an adapter at the end.

Knows nothing of Ray: it takes a `report` callable and finds rank and world size in `torch.distributed`. What it
writes into a run's directory: `config.json`, `metrics.jsonl`, `checkpoint/` where asked for, and at the end
`adapter/` (PEFT).
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel

from cbtrain import checkpoint, distributed
from cbtrain.config import CircuitBreakerConfig
from cbtrain.data import CircuitBreakerData, check_batch, load_data, pad_token_id, step_batches
from cbtrain.evaluate import evaluate, held_out
from cbtrain.model import add_adapter, check_fit, check_rows, forget_base, load_base, load_tokenizer, student_mode
from cbtrain.schedule import coefficients, learning_rate
from cbtrain.step import CircuitBreakerStep

Metrics = dict[str, float]
LOSSES = ("loss", "loss_reroute", "loss_retain", "loss_kl")
"""Names of `StepOutput.parts`, in its order."""
Report = Callable[[Metrics], None]


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite. The weights are those before it."""


def train(config: CircuitBreakerConfig, output_dir: Path, report: Report, *, resume: bool = False) -> Metrics:
    """Train one adapter; every rank calls it.

    Args:
        config: with `model` and data files that exist on this machine (`model.resolve`).
        output_dir: the run's directory; what an earlier run left in it is replaced, or continued with `resume`.
        report: called on every rank with each logged line of metrics, already reduced over ranks.
        resume: continue from the newest checkpoint.

    Returns:
        The last line of metrics, with the held-out ones, and `train_s` and `eval_s` (seconds).

    Raises:
        InputError: configuration, model and data do not fit, or there is nothing to resume from.
        NonFiniteLossError: before the update that would have carried it.
    """
    data, pad = prepare(config)
    with distributed.process_group(), adapted_model(config) as model, _engine(model, config) as engine:
        torch.manual_seed(config.seed + 1_000_003 * distributed.rank())
        first = checkpoint.load(engine, output_dir / "checkpoint", config) if resume else 0
        log = MetricsLog(output_dir, config, first)
        batches = held_out(data, config, pad)
        clock, metrics = Clock(), {}
        for step in range(first, config.steps):
            done = step + 1
            metrics = train_step(engine, data, pad, step)
            clock.lap("train")
            evaluating = done == config.steps or (config.eval_every > 0 and done % config.eval_every == 0)
            if evaluating:
                metrics |= evaluate(model, batches, config)
                clock.lap("eval")
            metrics |= {"train_s": clock.seconds["train"], "eval_s": clock.seconds["eval"]}
            if evaluating or done == 1 or done % config.log_every == 0:
                log.write(metrics)
                report(metrics)
            if config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps:
                checkpoint.save(engine, output_dir / "checkpoint", done, config)
            clock.lap("other")
        save_adapter(model, output_dir / "adapter", config)
    return metrics


def train_step(engine: deepspeed.DeepSpeedEngine, data: CircuitBreakerData, pad: int, step: int) -> Metrics:
    """One optimizer update, after `step` updates; its metrics, reduced over ranks.

    Raises:
        NonFiniteLossError: on every rank, before the update.
    """
    config: CircuitBreakerConfig = engine.module.config
    rank, world = distributed.rank(), distributed.world_size()
    started = time.perf_counter()
    micro_batches, counts = step_batches(data, config, step, pad, rank, world)
    weights, lr = coefficients(config, step), learning_rate(config, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    # DeepSpeed averages over ranks and micro-steps; the losses are already shares of the global mean.
    undo_average = len(micro_batches) * world
    parts = torch.zeros(4, device=distributed.device())
    tokens = torch.zeros(1, device=distributed.device())
    for index, batch in enumerate(micro_batches):
        output = engine(batch, counts, weights)
        parts += output.parts
        tokens += batch.harmful.attention_mask.sum() + batch.benign.attention_mask.sum()
        if index == len(micro_batches) - 1:
            totals = distributed.reduce_sum(torch.cat([parts, tokens])).tolist()
            _require_finite(totals, step + 1)
        engine.backward(output.loss * undo_average)
        grad_norm = _unclipped_norm(engine) if config.zero_stage == 0 else None
        engine.step()
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm())
    losses = dict(zip(LOSSES, totals, strict=False))
    return {
        "step": step + 1,
        **losses,
        "cs": weights.cs,
        "cr": weights.cr,
        "alpha": config.alpha,
        "beta_kl": config.beta_kl,
        "kl_temperature": config.kl_temperature,
        "kl_weight": weights.kl_weight,
        "grad_norm_total": grad_norm,
        "lr": lr,
        "scored_tokens_harmful": counts.harmful_tokens,
        "scored_tokens_benign": counts.benign_tokens,
        "tokens_per_s": totals[-1] / (time.perf_counter() - started),
    }


def console_line(metrics: Metrics) -> str:
    """The line of a training run: unweighted losses, and α, the current reroute coefficient."""
    line = (
        f"Step {metrics['step']}: loss={metrics['loss']:.4f}, reroute={metrics['loss_reroute']:.4f}, "
        f"retain={metrics['loss_retain']:.4f}, kl={metrics['loss_kl']:.4f}, α={metrics['cs']:.4f}"
    )
    if "eval_loss_reroute" in metrics:
        line += (
            f"\n  held out: reroute={metrics['eval_loss_reroute']:.4f}, benign KL={metrics['eval_benign_kl']:.4f} "
            f"nats/token, harmful NLL={metrics['eval_harmful_nll']:.2f} (base {metrics['base_harmful_nll']:.2f})"
        )
    return line


class Clock:
    """Seconds spent in each kind of work."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "eval": 0.0, "other": 0.0}
        self._since = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Count the time since the last lap as work of this kind."""
        now = time.perf_counter()
        self.seconds[kind] += now - self._since
        self._since = now


class MetricsLog:
    """`metrics.jsonl`, a line a logged step, written by rank 0; a resumed run drops the lines it will write again."""

    def __init__(self, output_dir: Path, config: CircuitBreakerConfig, first_step: int) -> None:
        self._path = output_dir / "metrics.jsonl" if distributed.rank() == 0 else None
        if self._path is None:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text_atomically(output_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        kept = []
        if first_step and self._path.is_file():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= first_step]
        checkpoint.write_text_atomically(self._path, "".join(line + "\n" for line in kept))

    def write(self, metrics: Metrics) -> None:
        """Append a line."""
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; a half-written last line counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


DATA_FIELDS = ("model", "tokenizer", "harmful", "benign", "mask_policy", "max_length", "eval_fraction")


def prepare(config: CircuitBreakerConfig) -> tuple[CircuitBreakerData, int]:
    """Check the configuration against model and data without loading weights.

    Returns:
        The tokenised rows, read once in a process for the same unchanged files, and the padding token's id.
    """
    config.validate()
    check_fit(config)
    files = [Path(file) for file in (*config.harmful, *config.benign)]
    stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    return _tokenised(tuple(getattr(config, name) for name in DATA_FIELDS), stamps)


@functools.lru_cache(maxsize=1)
def _tokenised(fields: tuple, _stamps: tuple) -> tuple[CircuitBreakerData, int]:
    config = CircuitBreakerConfig(**dict(zip(DATA_FIELDS, fields, strict=True)))
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)
    rows = [row for side in (data.harmful, data.benign) for row in (*side.train, *side.held_out)]
    check_rows(config, max(len(row.input_ids) for row in rows), max(max(row.input_ids) for row in rows))
    return data, pad_token_id(tokenizer)


@contextlib.contextmanager
def adapted_model(config: CircuitBreakerConfig) -> Iterator[PeftModel]:
    """The base model with a fresh adapter for the body; taken off again, so that the base serves the next run."""
    model = add_adapter(load_base(config), config)
    try:
        yield model
    finally:
        if config.zero_stage == 3:
            forget_base()  # its weights have been partitioned in place
        else:
            model.unload()


@contextlib.contextmanager
def _engine(model: PeftModel, config: CircuitBreakerConfig) -> Iterator[deepspeed.DeepSpeedEngine]:
    """A DeepSpeed engine around the step, with AdamW over the adapter's parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": check_batch(config, distributed.world_size()),
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=CircuitBreakerStep(model, config),
        model_parameters=parameters,
        optimizer=torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay),
        config=settings,
        dist_init_required=False,
    )
    student_mode(model)
    try:
        yield engine
    finally:
        engine.destroy()


def _require_finite(totals: list[float], step: int) -> None:
    if not all(math.isfinite(value) for value in totals):
        named = ", ".join(f"{name} {value:g}" for name, value in zip(LOSSES, totals, strict=False))
        raise NonFiniteLossError(f"step {step}: a loss is not finite ({named}); lower --lr")


def _unclipped_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Global norm of the gradients at a boundary, which stage 0 does not keep."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0


def save_adapter(model: PeftModel, directory: Path, config: CircuitBreakerConfig) -> None:
    """Write the adapter for plain PEFT, whole or not at all; all ranks call it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, enabled=config.zero_stage == 3):
        if distributed.rank() == 0:
            scratch = directory.with_name(directory.name + ".tmp")
            shutil.rmtree(scratch, ignore_errors=True)
            model.save_pretrained(scratch)
            shutil.rmtree(directory, ignore_errors=True)
            scratch.rename(directory)
