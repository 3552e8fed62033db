"""The sweep that people write today: the public circuit-breaker step in a plain function trainable on Ray Tune.

    python -m tests.benchmarks.peers.public_sweep --config config.json --output DIR --num-samples 20 --baselines 4

Run by `bench_sweep`. Stock `OptunaSearch` (TPE) looks for the beta_kl and kl_temperature of least benign drift; first
as many trials without KL as ours has, by whose rerouting the infeasible ones are discarded afterwards. That is what is
within reach of a single-objective search without further code: the limit is known only once the baselines are, and
with a penalty in the objective TPE does worse than with this (`bench_search`, TPE against constrained TPE). Each trial
is a process of its own (`reuse_actors=False`): it imports, loads the model, renders and tokenises the rows, trains with
four whole forwards a step, every hidden state and all logits, evaluates the held-out rows by whole forwards, and saves
its adapter once with PEFT.

Rows, batches, the adapter's start, AdamW and the schedules are those of `cbtrain`, so that a trial's metrics are ours
up to rounding. In bfloat16 the adapter is float32 under autocast, as Hugging Face's Trainer has it. What spares it work
against public code: rows are padded to the longest of the batch, not to the maximal length; held-out rows of like
length stand together; the retain term's norms are given (ours measures them); no checkpoints, no gradient norms, no
dashboard. Its searched trials all have one seed, as stock OptunaSearch knows none.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
import torch.nn.functional as F
from peft import PeftModel
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.surrogate.search_space import BETA_KL_RANGE, KL_TEMPERATURE_RANGE
from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import TokenBatch, held_out_batches, pad_token_id, step_batches
from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.loading import load_data
from cbtrain.losses.schedule import coefficients, learning_rate
from cbtrain.model.lora import add_adapter, student_mode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # which pytest puts there itself
from masks import prediction_mask, token_mask
from plain_step import plain_step

ROOT = Path(__file__).resolve().parents[3]
OBJECTIVE = "eval_benign_kl"


def run_trial(setting: dict[str, Any], config: CircuitBreakerConfig, output: Path, threads: int) -> None:
    """Train one setting from nothing, and report each evaluation."""
    torch.set_num_threads(threads)
    config = replace(config, **setting)
    bfloat16 = config.dtype == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
    data, pad = load_data(config, tokenizer), pad_token_id(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
    model = add_adapter(base.requires_grad_(False).eval(), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    curve = []
    for step in range(config.steps):
        (batch,), _ = step_batches(data, config, step, pad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = plain_step(model, batch, config, coefficients(config, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done == config.steps or (config.eval_every and done % config.eval_every == 0):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                curve.append({"step": done, **evaluate(model, data, config, pad)})
            if done < config.steps:
                tune.report(curve[-1])
    directory = output / "trials" / tune.get_context().get_trial_name()
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps({"setting": setting, "pid": os.getpid(), "curve": curve}))
    model.save_pretrained(directory / "adapter")
    tune.report(curve[-1])


@torch.no_grad()
def evaluate(model: PeftModel, data: CircuitBreakerData, config: CircuitBreakerConfig, pad: int) -> dict[str, float]:
    """The metrics of `cbtrain.evaluation.held_out.evaluate`, each by whole forwards of student and teacher."""
    model.eval()
    found: dict[str, list[Tensor]] = defaultdict(list)
    for rows in held_out_batches(data.harmful.held_out, config.eval_batch_size, pad):
        student, teacher = _both(model, rows)
        for layer in config.target_layers:
            ours, theirs = (output.hidden_states[layer][token_mask(rows)].float() for output in (student, teacher))
            cosine = F.cosine_similarity(ours, theirs, dim=-1)
            found["eval_loss_reroute"].append(F.relu(cosine))
            found[f"eval_cosine_layer_{layer}"].append(cosine)
            found[f"eval_cosine_positive_layer_{layer}"].append((cosine > 0).float())
        for name, output in (("eval_harmful_nll", student), ("base_harmful_nll", teacher)):
            found[name].append(_nll(_log_probabilities(output, rows), rows))
    for rows in held_out_batches(data.benign.held_out, config.eval_batch_size, pad):
        student, teacher = _both(model, rows)
        for layer in config.target_layers:
            ours, theirs = (output.hidden_states[layer][token_mask(rows)].float() for output in (student, teacher))
            found["eval_loss_retain"].append((ours - theirs).norm(dim=-1))
            found[f"distance_{layer}"].append((ours - theirs).norm(dim=-1))
            found[f"base_norm_layer_{layer}"].append(theirs.norm(dim=-1))
        log_q, log_p = _log_probabilities(student, rows), _log_probabilities(teacher, rows)
        found["eval_benign_kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
        found["eval_benign_top1_agreement"].append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        found["eval_benign_nll"].append(_nll(log_q, rows))
        found["base_benign_nll"].append(_nll(log_p, rows))
    student_mode(model)
    metrics = {name: torch.cat(values).double().mean().item() for name, values in found.items()}
    for layer in config.target_layers:
        metrics[f"eval_distance_layer_{layer}"] = metrics.pop(f"distance_{layer}") / metrics[f"base_norm_layer_{layer}"]
    return metrics


def _both(model: PeftModel, rows: TokenBatch) -> tuple[Any, Any]:
    """The whole outputs of student and teacher."""
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    student = model(**inputs, output_hidden_states=True, use_cache=False)
    with model.disable_adapter():
        return student, model(**inputs, output_hidden_states=True, use_cache=False)


def _log_probabilities(output: Any, rows: TokenBatch) -> Tensor:
    """[M, V] at the scored predictions."""
    return F.log_softmax(output.logits[prediction_mask(rows)].float(), dim=-1)


def _nll(log_probabilities: Tensor, rows: TokenBatch) -> Tensor:
    following = rows.input_ids.flatten()[prediction_mask(rows).flatten().nonzero().flatten() + 1]
    return F.nll_loss(log_probabilities, following, reduction="none")


def tuned(trainable: Any, space: dict[str, Any], output: Path, name: str, concurrency: int, **search: Any) -> list:
    """What a `Tuner` makes of it, each trial's last metrics with its setting."""
    results = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrency, reuse_actors=False, **search),
        run_config=tune.RunConfig(name=name, storage_path=str(output / "ray"), verbose=1),
    ).fit()
    if results.errors:
        raise results.errors[0]
    return [{**result.config, **result.metrics} for result in results]


def main() -> None:
    """Baselines, the search, and the observed feasible trial of least drift."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="config.json of a run, model and data resolved")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-samples", type=int, required=True, help="trials in all")
    parser.add_argument("--baselines", type=int, required=True, help="of these, at beta_kl 0, each on its own seed")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a trial")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share of its rerouting that a trial may lose")
    options = parser.parse_args()
    config = CircuitBreakerConfig(**json.loads(options.config.read_text()))
    found = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))  # of the trials' processes
    ray.init(include_dashboard=False)
    work = tune.with_parameters(run_trial, config=config, output=options.output, threads=options.threads)
    trainable = tune.with_resources(work, {"CPU": options.threads})
    seeds = range(config.seed, config.seed + options.baselines)
    off = {"beta_kl": 0.0, "kl_temperature": 1.0}
    baselines = tuned(
        trainable, {**off, "seed": tune.grid_search(list(seeds))}, options.output, "baselines", options.concurrency
    )
    space = {"beta_kl": tune.loguniform(*BETA_KL_RANGE), "kl_temperature": tune.uniform(*KL_TEMPERATURE_RANGE)}
    searched = tuned(
        trainable,
        space,
        options.output,
        "search",
        options.concurrency,
        search_alg=OptunaSearch(seed=config.seed),
        metric=OBJECTIVE,
        mode="min",
        num_samples=options.num_samples - options.baselines,
    )
    reroute = sum(result["eval_loss_reroute"] for result in baselines) / len(baselines)
    limit = reroute + options.tolerance * (1 - reroute)
    feasible = [result for result in searched if result["eval_loss_reroute"] <= limit]
    best = min(feasible, key=lambda result: result[OBJECTIVE], default=None)
    print("best", {name: best[name] for name in (*space, OBJECTIVE, "eval_loss_reroute")} if best else None)


if __name__ == "__main__":
    main()
