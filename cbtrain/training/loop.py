"""The training loop: a DeepSpeed engine around the step, held-out evaluation, checkpoints, an adapter at the end.

Knows nothing of Ray: it takes a `report` callable and finds rank and world size in `torch.distributed`. What it
writes into a run's directory: `config.json`, `metrics.jsonl`, `checkpoint/` where asked for, and at the end
`adapter/` (PEFT).
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
from torch import Tensor

from cbtrain.checkpoints.checkpoint import Checkpoints
from cbtrain.checkpoints.manifest import Progress
from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.evaluation.convergence import STILL_FALLING, convergence_metrics
from cbtrain.evaluation.held_out import evaluate, held_out
from cbtrain.losses.schedule import coefficients, learning_rate
from cbtrain.model.checks import prepare
from cbtrain.model.partial_forward import Decoder
from cbtrain.teacher_cache.build import open_or_build
from cbtrain.teacher_cache.plan import CacheUnavailableError
from cbtrain.teacher_cache.retain_norms import with_retain_norms
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.training.dataloader import StepInput, StepLoader
from cbtrain.training.engine import (
    adapted_model,
    deepspeed_engine,
    hold_updates_if,
    save_adapter,
    unclipped_grad_norm,
)
from cbtrain.training.gradient_norms import GradientNorms
from cbtrain.training.metrics import Clock, Metrics, MetricsLog, Report, Update, Updates
from cbtrain.training.model_card import write_card
from cbtrain.training.non_finite import micro_step
from cbtrain.utils import distributed
from cbtrain.utils.profile import OFF, Profile
from cbtrain.utils.stopping import Asked, Interrupted, never


def train(
    config: CircuitBreakerConfig,
    output_dir: Path,
    report: Report,
    *,
    resume: bool = False,
    teacher_cache: Path | None = None,
    progress: Callable[[int], None] = lambda _step: None,
    reroute_tolerance: float = STILL_FALLING,
    profile: Profile = OFF,
    stop: Asked = never,
) -> Metrics:
    """Train one adapter; every rank calls it.

    Args:
        config: with `model` and data files that exist on this machine (`model.resolve`).
        output_dir: the run's directory; what an earlier run left in it is replaced, or continued with `resume`.
        report: called on every rank with each logged line of metrics, already reduced over ranks.
        resume: continue from the newest checkpoint.
        teacher_cache: where the teacher's states are kept, and put where they are missing; None runs the teacher.
        progress: called on every rank after each update with the number done.
        reroute_tolerance: share of its rerouting that a run which `converged` gains at most over its last fifth.
        profile: where its time goes, written to `profile.json` by rank 0.
        stop: once it holds on a rank, the run writes a checkpoint and ends: behind the update, or within an evaluation.

    Returns:
        The last line of metrics, with the held-out ones, whether it `converged`, and `train_s` and `eval_s` (seconds).
        A resumed run counts there what its checkpoint had taken; it adds `resumed_from`, the checkpoint's step, and
        `earlier_s`, the seconds up to it.

    Raises:
        InputError: configuration, model and data do not fit.
        CheckpointError: there is nothing to resume from.
        NonFiniteLossError: a loss or gradient was not finite. Nothing of that update is saved but its rows
            (`non_finite.json`).
        Interrupted: it was stopped. Going on from its checkpoint gives what it would have given.
    """
    # Longer than fifty lines so that the whole loop reads top to bottom: update, evaluate, log, save.
    data, pad = prepare(config)
    with distributed.process_group(), adapted_model(config) as model, deepspeed_engine(model, config) as engine:
        decoder = engine.module.decoder
        cache = _cache(config, data, pad, decoder, teacher_cache)
        torch.manual_seed(config.seed + 1_000_003 * distributed.rank())
        checkpoints = Checkpoints(output_dir / "checkpoint", config, data)
        before = checkpoints.load(engine) if resume else checkpoints.begin()
        measured = before.retain_norms or config.retain_norms
        config = with_retain_norms(replace(config, retain_norms=measured), data, pad, decoder, cache)
        engine.module.config, engine.module.profile = config, profile
        first, clock = before.step, Clock(before.seconds)
        log, updates = MetricsLog(output_dir, config, first), Updates(config, clock, output_dir)
        batches, loader = held_out(data, config, pad), StepLoader(data, config, pad, decoder.layers, cache)
        gradients = GradientNorms(data, config, pad)
        curve = log.kept

        def save(done: int, unmeasured: Metrics | None = None) -> None:
            with profile.span("checkpoint"):
                checkpoints.save(engine, Progress(done, clock.seconds, config.retain_norms, unmeasured))

        def evaluated(metrics: Metrics) -> Metrics:
            done = int(metrics["step"])

            def heed() -> None:
                if distributed.any_rank(stop()):
                    if done > first:  # else it is in the checkpoint that the run goes on from
                        save(done, unmeasured=metrics)
                    raise Interrupted(done)

            with profile.span("evaluation"):
                found = evaluate(decoder, batches, config, cache, heed) | gradients.measure(engine.module, done)
            clock.lap("eval")
            return metrics | found

        def logged(metrics: Metrics) -> Metrics:
            metrics |= {"eval_s": clock.seconds["eval"]}
            curve.append(metrics)
            if metrics["step"] == config.steps:
                metrics |= convergence_metrics(curve, config.target_layers, reroute_tolerance)
            with profile.span("report"):
                log.write(metrics)
                report(metrics)
            return metrics

        metrics = logged(evaluated(dict(before.unmeasured))) if before.unmeasured else {}
        for done, given in enumerate(profile.each("data", loader.steps(first)), first + 1):
            updates.add(train_step(engine, given, done))
            progress(done)
            evaluating = done == config.steps or (config.eval_every > 0 and done % config.eval_every == 0)
            logging = evaluating or done == 1 or done % config.log_every == 0
            stopping = not evaluating and distributed.any_rank(stop())
            checkpointing = config.checkpoint_every > 0 and done % config.checkpoint_every == 0 and done < config.steps
            if logging or checkpointing or stopping:
                metrics = updates.read()
            if evaluating:
                metrics = evaluated(metrics)
            if logging:
                metrics = logged(metrics)
            if checkpointing or stopping:
                save(done)
            if stopping:
                raise Interrupted(done)
            clock.lap("other" if logging or checkpointing else "train")
        with profile.span("checkpoint"):
            save_adapter(model, output_dir / "adapter", config)
        if distributed.rank() == 0:
            write_card(output_dir / "adapter", config, data, metrics)
            profile.write(output_dir / "profile.json", config.steps - first)
    return metrics | ({"resumed_from": first, "earlier_s": sum(before.seconds.values())} if resume else {})


class TeacherPass(NamedTuple):
    """What runs of a configuration know of their teacher beforehand."""

    rows_computed: int = 0
    """Rows that the cache did not hold yet."""
    teacher_s: float = 0.0
    """Seconds that they took."""
    retain_norms: tuple[float, ...] | None = None
    """As in the configuration."""


def run_teacher(
    config: CircuitBreakerConfig, directory: Path | None, progress: Callable[[int], None] | None = None
) -> TeacherPass:
    """Fill a cache for runs of this configuration beforehand and measure what they need; every rank calls it.

    Args:
        directory: of the cache; None fills none.
        progress: called with the number of rows that were just done.

    Raises:
        InputError: as `train`.
        CacheUnavailableError: it cannot be written or read there.
    """
    data, pad = prepare(config)
    with adapted_model(config) as model, contextlib.ExitStack() as partitioned:
        if config.zero_stage == 3:
            partitioned.enter_context(distributed.process_group())
            decoder = partitioned.enter_context(deepspeed_engine(model, config)).module.decoder
        else:
            decoder = Decoder(model, config.hidden_states)
        cache = open_or_build(config, data, pad, decoder, directory, progress) if directory else None
        norms = with_retain_norms(config, data, pad, decoder, cache).retain_norms
    return TeacherPass(cache.rows_computed, cache.teacher_s, norms) if cache else TeacherPass(retain_norms=norms)


def _cache(
    config: CircuitBreakerConfig, data: CircuitBreakerData, pad: int, decoder: Decoder, directory: Path | None
) -> TeacherCache | None:
    """The cache of a run that wants one; None, and a line that says why, where it cannot be had."""
    if distributed.any_rank(directory is None) or directory is None:  # one rank's disk may have been too small
        return None
    try:
        return open_or_build(config, data, pad, decoder, directory)
    except CacheUnavailableError as error:
        if distributed.rank() == 0:
            print(f"teacher cache {error}; every step runs the teacher", file=sys.stderr, flush=True)
        return None


def train_step(engine: deepspeed.DeepSpeedEngine, given: StepInput, step: int) -> Update:
    """The optimizer update that makes `step` of them, without waiting for the device.

    From the first loss that is not finite on, weights and optimizer stay as they are.
    """
    config: CircuitBreakerConfig = engine.module.config
    profile: Profile = engine.module.profile
    weights, lr = coefficients(config, step - 1), learning_rate(config, step - 1)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    # DeepSpeed averages over ranks and micro-steps; the losses are already shares of the global mean.
    undo_average = len(given.micro_batches) * distributed.world_size()
    parts = torch.zeros(4, device=distributed.device())
    grad_norm: Tensor | float | None = None
    micro_steps = []
    for index, batch in enumerate(given.micro_batches):
        output = engine(batch, given.counts, weights)
        parts += output.parts
        micro_steps.append(micro_step(batch, output.parts))
        with profile.span("backward"):
            engine.backward(output.loss * undo_average)
        if index == len(given.micro_batches) - 1:
            distributed.reduce_sum(parts)
            hold_updates_if(~parts.isfinite().all(), engine)
            grad_norm = unclipped_grad_norm(engine) if config.zero_stage == 0 else None
        with profile.span("optimizer"):
            engine.step()
    if grad_norm is None:
        grad_norm = engine.get_global_grad_norm()
    return Update(step, parts, grad_norm, given.counts, weights, lr, micro_steps)
