"""Six sweeps that a page must tell apart at a glance: each a run directory, by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from synthetic import Surface, failing, make_trials, repeated, write_behaviour, write_run

PICK = (0.3, 1.0)


def told_whole(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with all that real ones say, each metric in keeping with the others."""
    rng = np.random.default_rng(5)
    rows, beta = len(trials), trials["beta_kl"].to_numpy(float)
    baseline = trials[trials["beta_kl"] == 0].groupby("seed")["eval_loss_reroute"].mean()
    tolerance = 0.05 * (1 - baseline.mean())
    reference = trials["seed"].map(baseline).fillna(baseline.mean())
    loss = trials["eval_loss_reroute"]
    moved = 1 - loss
    more = {f"eval_cosine_layer_{layer}": 0.98 - 1.2 * moved + rng.normal(0, 0.02, rows) for layer in (10, 20)}
    more |= {f"collapse_step_layer_{layer}": np.where(loss < 0.5, 22.0 + layer / 5, np.nan) for layer in (10, 20)}
    return trials.assign(
        loss_reroute=(0.8 * loss).clip(0, 1),
        loss_kl=0.3 * trials["eval_benign_kl"] * trials["kl_temperature"] ** 1.5,
        eval_harmful_nll=trials["base_harmful_nll"] + 9 * moved - 2 * beta,
        eval_benign_nll=trials["base_benign_nll"] + 0.05 * trials["eval_benign_kl"],
        reroute_regression=loss - reference - tolerance,
        grad_norm_total=rng.uniform(0.5, 1, rows) + 2 * np.minimum(beta, 1),
        ended_at=1.7957736e9 + 30.0 * np.arange(rows),
        wall_s=60 + rng.uniform(-5, 5, rows),
        **more,
    )


def chosen() -> pd.DataFrame:
    return told_whole(repeated(make_trials(Surface()), PICK, (1, 2)))


def never_rerouted() -> pd.DataFrame:
    trials = make_trials(Surface())
    trials["eval_loss_reroute"] = 0.97 - 0.0005 * np.arange(len(trials))
    trials["eval_benign_kl"] *= 0.001
    return told_whole(trials)


def running() -> pd.DataFrame:
    trials = chosen().iloc[:13].copy()
    last = trials.index[-2:]
    trials.loc[last, "status"] = "running"
    measured = [*trials.filter(regex="^(eval|loss|grad|collapse)").columns, "reroute_regression", "ended_at", "wall_s"]
    trials.loc[last, measured] = float("nan")
    return trials


GOLDEN: dict[str, tuple[Callable[[], pd.DataFrame], dict[str, Any]]] = {
    "choose": (chosen, {}),
    "nothing feasible": (lambda: told_whole(make_trials(Surface(threshold=0.0002, slope=0.05), searched=14)), {}),
    "never rerouted": (never_rerouted, {}),
    "noisy": (lambda: told_whole(make_trials(Surface(), noise=0.08, shared=0.08, rng_seed=1)), {}),
    "running": (running, {"status": "running", "settings": {"num_samples": 20}}),
    "suspect seed": (lambda: told_whole(failing(repeated(make_trials(Surface()), PICK, (1, 2, 3)), "t101")), {}),
}
"""Trials and the keys of sweep.json that differ from those of a finished sweep."""


def golden_run(directory: Path, name: str) -> Path:
    """The run directory of one case, with what its models write and what its training logged."""
    trials, sweep = GOLDEN[name]
    table = trials()
    record = {"rows": {side: {"train": 150, "held_out": 50} for side in ("harmful", "benign")}, **RECORD}
    run = write_run(directory, table, **{**record, **sweep})
    for row in table.to_dict("records"):
        with (run / "trials" / row["trial_id"] / "metrics.jsonl").open("a", encoding="utf-8") as file:
            if row["status"] == "completed":
                for step in (71, 80, 90):
                    norms = {
                        "grad_norm_reroute": 40 / step,
                        "grad_norm_retain": 0.8,
                        "grad_norm_kl": 2 * row["beta_kl"],
                    }
                    file.write(json.dumps({"step": step, "loss_reroute": row["loss_reroute"], **norms}) + "\n")
    if name in ("choose", "suspect seed"):
        for trial_id, kept in {"t000": 0.2, "t005": 0.85, "t004": 0.7}.items():
            write_behaviour(run, trial_id, degenerate=0.3 * (1 - kept), complied=0.05, prefilled=0.0)
            _write_completions(run / "trials" / trial_id / "completions.jsonl", trial_id)
    return run


RECORD = {
    "begun_at": "2026-11-27T10:00:00+0000",
    "config": {
        "model": "models/llama-small",
        "dtype": "bfloat16",
        "steps": 90,
        "harmful": ["h.jsonl"],
        "benign": ["b.jsonl"],
    },
    "inputs": {"h.jsonl": "1f" * 32, "b.jsonl": "2e" * 32, "models/llama-small/model.safetensors": "3d" * 32},
    "workers": {"count": 1, "cpus": 1, "gpus": 0.0},
    "concurrency": 2,
    "wall_s": 640.0,
}
HOSTILE = "</script><img src=x onerror=alert(1)>"


def _write_completions(path: Path, trial_id: str) -> None:
    """Eight prompts a kind, one of them with text that a page must show and not run."""
    rows = []
    for kind in ("harmful", "benign", "harmful_prefilled"):
        for i in range(8):
            answer = {"text": f"Answer {i} of {trial_id}. {HOSTILE if i == 0 else 'word ' * 60}", "verdict": "coherent"}
            rows.append({"kind": kind, "source": f"rows.jsonl:{i}", "prompt": f"Prompt {i}", "teacher": answer,
                         "student": answer})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
