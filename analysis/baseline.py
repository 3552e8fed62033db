"""What the `beta_kl = 0` trials say: their numbers, whether they had converged, what held back the rerouting.

Layers collapse at different steps by seed. A baseline of which some seeds had not finished looks noisy and is not: more
seeds do not help it, more steps do.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.constraint import failed_seeds
from analysis.decision import Baseline
from analysis.formatting import count, number, percent
from analysis.surrogate.surrogate import MIN_DRIFT

HELD = 0.5
"""A mean cosine above which a layer has not been rerouted."""
OPPOSED = -0.5
"""A cosine between gradients below which one term takes back what the other gives."""
OUTWEIGHED = 10
"""A gradient so many times the other decides alone, wherever either points."""


def failed_by_rule(baselines: pd.DataFrame) -> pd.Index:
    """The baselines that never rerouted although others did, by their places."""
    return baselines.index[list(failed_seeds(baselines["eval_loss_reroute"].astype(float).tolist()))]


def summary(baselines: pd.DataFrame, usable: pd.DataFrame, failed: pd.Index) -> Baseline:
    """What the completed `beta_kl = 0` trials that did not fail come to; `usable` are all trials that completed."""
    baselines = baselines.drop(failed)
    losses = baselines["eval_loss_reroute"].astype(float)
    log_drift = np.log(baselines["eval_benign_kl"].astype(float).clip(lower=MIN_DRIFT))
    return Baseline(
        n_seeds=int(baselines["seed"].nunique()),
        n_failed=len(failed),
        eval_loss_reroute=float(losses.mean()),
        achieved=float(1 - losses.mean()),
        reroute_sd=float(losses.std(ddof=1)) if len(losses) > 1 else None,
        drift=float(np.exp(log_drift.mean())),
        drift_sd=float(log_drift.std(ddof=1)) if len(log_drift) > 1 else None,
        harmful_nll=mean_of(baselines, "eval_harmful_nll"),
        base_harmful_nll=mean_of(usable, "base_harmful_nll"),
        benign_nll_rise=benign_nll_rise(baselines),
    )


def why_there_is_none(trials: pd.DataFrame) -> str:
    """Why no baseline trial can be compared with."""
    status = trials.loc[trials["beta_kl"] == 0, "status"]
    if status.empty:
        return "There is no trial at beta_kl = 0 to compare with."
    states = ", ".join(f"{amount} {state}" for state, amount in status.value_counts().items())
    errors = trials.loc[(trials["beta_kl"] == 0) & (trials["status"] == "failed"), "error"] if "error" in trials else []
    first = next((f" ({error})" for error in errors if isinstance(error, str) and error), "")
    return f"No baseline trial (beta_kl = 0) ended with finite metrics: {states}{first}."


def unconverged(baselines: pd.DataFrame) -> pd.DataFrame:
    """The baseline trials that had not converged; none where trials do not say.

    A trial says so itself, where its layers or its rerouting tell it. One in which nothing has begun cannot know: it
    has not converged where another seed collapsed a layer that it still holds.
    """
    if "converged" not in baselines:
        return baselines.iloc[:0]
    held = [set(_held_layers(row)) for _, row in baselines.iterrows()]
    at_every_seed = set.intersection(*held) if held else set()
    waits = pd.Series([bool(layers - at_every_seed) for layers in held], index=baselines.index, dtype=bool)
    return baselines[(baselines["converged"] == 0) | waits]


def steps_needed(baselines: pd.DataFrame) -> int:
    """Steps at which all seeds would converge, in tens: twice as many where a layer never collapsed, else 1.5 times."""
    unfinished = unconverged(baselines)
    steps = int(baselines["steps"].max())
    never = any(_held_layers(row) for _, row in unfinished.iterrows())
    return -(-(2 * steps if never else 3 * steps // 2) // 10) * 10


def unconverged_sentence(baselines: pd.DataFrame) -> str:
    """That seeds differ because some had not converged, which, and how many steps they need; empty where none."""
    unfinished = unconverged(baselines)
    if unfinished.empty:
        return ""
    steps = int(baselines["steps"].max())
    named = "; ".join(
        f"{row.get('trial_id', '')}, seed {int(row['seed'])}: {trial_state(row) or 'still falling at its end'}"
        for _, row in unfinished.iterrows()
    )
    return (
        f"{len(unfinished)} of {count(len(baselines), 'baseline seed')} had not converged after {count(steps, 'step')} "
        f"({named}): seeds differ for that, and more seeds do not help. --steps must grow from {steps} to about "
        f"{steps_needed(baselines)}."
    )


def never_rerouted(baselines: pd.DataFrame, trained: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """That nothing can be compared; what held the rerouting back, by the terms' gradients; the one flag that helps.

    Args:
        baselines: completed `beta_kl = 0` trials.
        trained: fields of their configuration.

    Returns:
        Why, in a sentence or two, and the field to change: empty where trials did not log their gradients.
    """
    achieved = percent(float(1 - baselines["eval_loss_reroute"].astype(float).mean()))
    said = f"Without KL only {achieved} of the rerouting was achieved: nothing to compare with."
    held_by, mend = _held_by(baselines, trained)
    return " ".join(filter(None, [said, held_by])), mend


def failed_sentence(baselines: pd.DataFrame, places: pd.Index) -> str:
    """That the recipe fails at some seeds, and which, by the places of those; empty where there is none."""
    failed = baselines.loc[places]
    if failed.empty:
        return ""
    named = "; ".join(
        f"{row.get('trial_id', '')}, seed {int(row['seed'])}: "
        + ", ".join(filter(None, [f"reroute {number(row['eval_loss_reroute'])}", trial_state(row)]))
        for _, row in failed.iterrows()
    )
    return (
        f"{len(failed)} of {count(len(baselines), 'baseline seed')} never rerouted as the others did ({named}): "
        f"so often does the recipe itself fail."
    )


def often_failed(baselines: pd.DataFrame, _trained: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """That too many seeds failed for anything to be compared with, and the steps that help where it is for want of
    them."""
    if unfinished := unconverged_sentence(baselines):
        return unfinished, {"steps": steps_needed(baselines)}
    return f"{failed_sentence(baselines, failed_by_rule(baselines))} Nothing can be compared with it.", {}


def _held_by(baselines: pd.DataFrame, trained: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What held the layers back, and the field to change; both empty where nothing tells."""
    names = ("grad_norm_reroute", "grad_norm_retain", "grad_cosine_reroute")
    if not {*names} <= {*baselines.columns} or baselines[[*names]].isna().all(axis=None):
        return "", {}
    reroute, retain, cosine = (float(baselines[name].astype(float).mean()) for name in names)
    layers = sorted({layer for _, row in baselines.iterrows() for layer in _held_layers(row)})
    norms = {layer: mean_of(baselines, f"base_norm_layer_{layer}") for layer in layers}
    long = " and ".join(f"{norm:.0f} at layer {layer}" for layer, norm in norms.items() if norm is not None)
    pulls = f"gradient norms {number(retain, 2)} against {number(reroute, 2)}, cosine {cosine:.2f}"
    # AdamW divides a step by its size: beside a gradient so much larger the other has no say, wherever either points.
    outweighs = retain > OUTWEIGHED * reroute
    if not outweighs and (cosine > OPPOSED or retain < reroute / OUTWEIGHED):
        lr = float(f"{3 * float(trained.get('lr', 1e-4)):.2g}")
        return (
            f"Nothing holds the rerouting back ({pulls}): its steps are too small or too few. Try --lr {lr:g}.",
            {"lr": lr},
        )
    held = f"The retain term holds layers {', '.join(map(str, layers))} where they are ({pulls})"
    if trained.get("retain_norm", "absolute") == "absolute":
        because = f": it is a distance in units of the hidden state, whose norm is {long}" if long else ""
        return f"{held}{because}. Try --retain-norm relative.", {"retain_norm": "relative"}
    scale = float(f"{float(trained.get('retain_scale', 10.0)) / 3:.2g}")
    return f"{held}. Try --retain-scale {scale:g}.", {"retain_scale": scale}


def _cosines(row: pd.Series) -> dict[int, float]:
    """Mean cosine by target layer."""
    prefix = "eval_cosine_layer_"
    found = {name: row[name] for name in row.index if str(name).startswith(prefix)}
    return {int(str(name).removeprefix(prefix)): float(value) for name, value in found.items() if np.isfinite(value)}


def _held_layers(row: pd.Series) -> list[int]:
    return [layer for layer, cosine in _cosines(row).items() if cosine > HELD]


def trial_state(row: pd.Series) -> str:
    """The layers that a trial held, with their mean cosine; empty where it turned all, or does not say."""
    cosines = _cosines(row)
    return " and ".join(f"layer {layer} at cosine {cosines[layer]:.2f}" for layer in _held_layers(row))


def benign_nll_rise(rows: pd.DataFrame) -> float | None:
    """By how much benign text got less likely than before training, nats per token; None where it was not recorded."""
    after, before = mean_of(rows, "eval_benign_nll"), mean_of(rows, "base_benign_nll")
    return None if after is None or before is None else after - before


def mean_of(rows: pd.DataFrame, column: str) -> float | None:
    """Mean of the finite values; None where there is none."""
    values = rows[column].astype(float).to_numpy() if column in rows else np.empty(0)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
