"""Six sweeps that a page must tell apart at a glance: each a run directory, by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from synthetic import Surface, failing, make_trials, repeated, write_behaviour, write_run

PICK = (0.3, 1.0)


def with_layers(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials that also say what their layers and gradients did."""
    rng = np.random.default_rng(5)
    rows = len(trials)
    more = {f"eval_cosine_layer_{layer}": rng.normal(-0.2, 0.04, rows) for layer in (10, 20)}
    more |= {f"collapse_step_layer_{layer}": np.full(rows, 25.0 + layer / 10) for layer in (10, 20)}
    return trials.assign(grad_norm_total=rng.uniform(0.5, 1, rows), **more)


def chosen() -> pd.DataFrame:
    return with_layers(repeated(make_trials(Surface()), PICK, (1, 2)))


def never_rerouted() -> pd.DataFrame:
    trials = with_layers(make_trials(Surface()))
    trials["eval_loss_reroute"] = trials["loss_reroute"] = 0.97 - 0.0005 * np.arange(len(trials))
    return trials


def running() -> pd.DataFrame:
    trials = chosen().iloc[:13].copy()
    trials.loc[trials.index[-2:], "status"] = "running"
    trials.loc[trials.index[-2:], ["eval_loss_reroute", "eval_benign_kl"]] = float("nan")
    return trials


GOLDEN: dict[str, tuple[Callable[[], pd.DataFrame], dict[str, Any]]] = {
    "choose": (chosen, {}),
    "nothing feasible": (lambda: with_layers(make_trials(Surface(always_lost=0.2), searched=14)), {}),
    "never rerouted": (never_rerouted, {}),
    "noisy": (lambda: with_layers(make_trials(Surface(), noise=0.08, shared=0.08, rng_seed=1)), {}),
    "running": (running, {"status": "running", "settings": {"num_samples": 20}}),
    "suspect seed": (lambda: failing(with_layers(repeated(make_trials(Surface()), PICK, (1, 2, 3))), "t101"), {}),
}
"""Trials and the keys of sweep.json that differ from those of a finished sweep."""


def golden_run(directory: Path, name: str) -> Path:
    """The run directory of one case, with what its models write and what its training logged."""
    trials, sweep = GOLDEN[name]
    table = trials()
    run = write_run(directory, table, **sweep)
    for trial_id, number in zip(table["trial_id"], range(len(table)), strict=True):
        with (run / "trials" / trial_id / "metrics.jsonl").open("a", encoding="utf-8") as file:
            norms = {"grad_norm_reroute": 0.1 + number % 3, "grad_norm_retain": 0.8, "grad_norm_kl": 0.2}
            file.write(
                json.dumps({"step": 71, "loss_reroute": float(table["loss_reroute"].iloc[number]), **norms}) + "\n"
            )
    if name in ("choose", "suspect seed"):
        for trial_id in ("t000", "t005", "t004"):
            write_behaviour(run, trial_id)
            _write_completions(run / "trials" / trial_id / "completions.jsonl", trial_id)
    return run


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
