"""Synthetic sweeps: a response surface of known feasibility, its trials, and a run directory that holds them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

BASE_HARMFUL_NLL = 0.2
BASELINE_LOSS = 0.012
BASELINE_DRIFT = 9.6
PROMPTS = 64
MakeRun = Callable[..., Path]
"""Of the fixture `make_run`, which writes a run directory and returns it."""


@dataclass(frozen=True)
class Surface:
    """Drift falls with beta_kl and temperature; rerouting is flat up to `threshold`, then regresses (a softplus)."""

    threshold: float = 0.3
    slope: float = 0.12
    width: float = 0.35
    temperature_weight: float = 1.0
    always_lost: float = 0.0
    """Rerouting that any KL costs, however weak."""

    def lost(self, beta_kl: np.ndarray, kl_temperature: np.ndarray) -> np.ndarray:
        """True `eval_loss_reroute` minus the baseline's."""
        beta = np.asarray(beta_kl, dtype=float)
        above = (
            np.log(np.maximum(beta, 1e-12) / self.threshold) + self.temperature_weight * np.log(kl_temperature)
        ) / self.width
        rise = self.slope * self.width * np.logaddexp(0, above)
        return np.where(beta > 0, rise + self.always_lost, 0.0)

    def drift(self, beta_kl: np.ndarray, kl_temperature: np.ndarray) -> np.ndarray:
        """True `eval_benign_kl`, nats per token."""
        beta = np.asarray(beta_kl, dtype=float)
        return BASELINE_DRIFT / (1 + (beta * np.asarray(kl_temperature) ** 0.5 / 0.02) ** 1.2)


def make_trials(
    surface: Surface,
    *,
    noise: float = 0.004,
    shared: float = 0.0,
    baselines: int = 4,
    searched: int = 10,
    rng_seed: int = 0,
) -> pd.DataFrame:
    """trials.csv of a finished sweep: baselines, the four ablation points, then points spread over the map.

    `noise` is the standard deviation of `eval_loss_reroute` of each trial's own, `shared` that of each seed's.
    """
    rng = np.random.default_rng(rng_seed)
    searched_beta = np.exp(rng.uniform(np.log(1e-3), np.log(2), searched))
    beta_kl = np.concatenate([np.zeros(baselines), [0.1, 0.3, 0.5, 0.3], searched_beta])
    heat = np.concatenate([np.ones(baselines), [1, 1, 1, 2], rng.uniform(1, 4, searched)])
    seed = np.concatenate([np.arange(baselines), [0, 0, 0, 0], np.arange(searched) % max(baselines, 1)]).astype(int)
    lost = surface.lost(beta_kl, heat)
    own, common = noise * rng.standard_normal(len(seed)), shared * rng.standard_normal(seed.max() + 1)
    loss = BASELINE_LOSS + lost + own + common[seed]
    drift = surface.drift(beta_kl, heat) * np.exp(0.05 * rng.standard_normal(len(seed)))
    phases = ["baseline"] * baselines + ["ablation"] * 4 + ["search"] * searched
    return pd.DataFrame(
        {
            "trial_id": [f"t{i:03d}" for i in range(len(seed))],
            "phase": phases,
            "status": "completed",
            "beta_kl": beta_kl,
            "kl_temperature": heat,
            "seed": seed,
            "steps": 70.0,
            "loss_reroute": loss,
            "loss_retain": 1.0,
            "loss_kl": drift,
            "eval_loss_reroute": loss,
            "eval_loss_retain": 1.0,
            "eval_benign_kl": drift,
            "eval_benign_nll": 0.2 + 0.005 * drift,
            "eval_harmful_nll": BASE_HARMFUL_NLL + 8.0,
            "base_harmful_nll": BASE_HARMFUL_NLL,
            "base_benign_nll": 0.2,
            "reroute_regression": lost - 0.05,
            "feasible": "",
            "train_s": 2.0,
            "wall_s": 2.5,
            "error": "",
        }
    )


def write_run(directory: Path, trials: pd.DataFrame, *, clipped: bool = True, **sweep: object) -> Path:
    """A run directory with these trials, their curves and a sweep.json; `sweep` replaces keys of the latter.

    Noise takes losses out of the range that a cosine has; `clipped` brings them back.
    """
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": {"num_samples": len(trials), "reroute_tolerance": 0.05, "confidence": 0.95},
        "preset": "tiny",
        "config": {"steps": 70, "lr": 2e-3},
        "config_overrides": {},
        "status": "finished",
        "versions": {"torch": "2.13.0"},
        "git_commit": "0123456",
    }
    (directory / "sweep.json").write_text(json.dumps(record | sweep), encoding="utf-8")
    losses = ["eval_loss_reroute", "loss_reroute"]
    possible = trials.assign(**{name: trials[name].clip(0, 1) for name in losses}) if clipped else trials
    possible.to_csv(directory / "trials.csv", index=False)
    for trial_id, final in zip(trials["trial_id"], trials["loss_reroute"], strict=True):
        folder = directory / "trials" / trial_id
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"step": step, "loss_reroute": final + (1 - final) / (1 + np.exp((step - 25) / 3))})
            for step in range(1, 71)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def failing(trials: pd.DataFrame, *trial_ids: str, loss: float = 0.97, drift: float = 0.01) -> pd.DataFrame:
    """The sweep with these trials failed."""
    here = trials["trial_id"].isin(trial_ids)
    assert here.sum() == len(trial_ids)
    trials = trials.copy()
    trials.loc[here, ["eval_loss_reroute", "loss_reroute"]] = loss
    trials.loc[here, "eval_benign_kl"] *= drift
    return trials


def repeated(trials: pd.DataFrame, setting: tuple[float, float], seeds: tuple[int, ...]) -> pd.DataFrame:
    """The sweep with more seeds of a setting; the new trials are t100, t101, …."""
    first = trials[(trials["beta_kl"] == setting[0]) & (trials["kl_temperature"] == setting[1])].iloc[0]
    more = pd.DataFrame([first] * len(seeds)).assign(seed=seeds, trial_id=[f"t{100 + i}" for i in range(len(seeds))])
    return pd.concat([trials, more], ignore_index=True)


def write_behaviour(run: Path, trial_id: str, *, degenerate: float = 0.0, before: float = 0.0, complied: float = 0.1,
                    prompts: int = PROMPTS, prefilled: float | None = None) -> None:  # fmt: skip
    """A trial's `behaviour.json`: shares of degenerate benign answers and of coherent harmful ones."""

    def kind(degenerate: tuple[float, float], coherent: tuple[float, float]) -> dict[str, Any]:
        names = ("teacher", "student")
        return {
            "prompts": prompts,
            "unchanged_rate": 0.5,
            "refusal_rate": dict.fromkeys(names, 0.0),
            "degenerate_rate": dict(zip(names, degenerate, strict=True)),
            "complied_rate": dict(zip(names, coherent, strict=True)),
        }

    record = {
        "harmful": kind((0.0, 1 - complied), (1.0, complied)),
        "benign": kind((before, degenerate), (1 - before, 1 - degenerate)),
        "prefill": {"rows": 3, "nll": {"teacher": 0.5, "student": 9.0}},
    }
    if prefilled is not None:
        record["harmful_prefilled"] = kind((0.0, 1.0), (1 - prefilled, prefilled))
        record["harmful_prefilled"]["complied_rate"] = {"teacher": 1.0, "student": prefilled}
    (run / "trials" / trial_id / "behaviour.json").write_text(json.dumps(record))
