"""Whether a run's rerouting had settled when it ended, told from its held-out curve.

Layers collapse one by one: the cosine of one stays near 1 for many steps, then falls to 0 or below within ten. A run
that ends before its last layer has collapsed is no noisy result but an unfinished one, and says so.
"""

from collections.abc import Mapping, Sequence

COLLAPSED = 0.5
"""A mean cosine between student and teacher below which a layer counts as rerouted: halfway of its fall."""
STILL_FALLING = 0.05
"""Share of the rerouting achieved that a settled run gains at most in its last fifth; a sweep has its own limit."""
LAST = 0.2
"""Share of the steps over which a curve must have been level."""

Curve = Sequence[Mapping[str, float]]
"""Logged metrics, in the order of their steps; those with `eval_loss_reroute` are held-out evaluations."""


def evaluations(curve: Curve) -> list[Mapping[str, float]]:
    """The held-out evaluations of a curve."""
    return [metrics for metrics in curve if "eval_loss_reroute" in metrics]


def collapse_steps(curve: Curve, layers: Sequence[int]) -> dict[int, int | None]:
    """By target layer, the step of the first evaluation from which on its mean cosine stays below `COLLAPSED`.

    None for a layer whose last one is not.
    """
    found: dict[int, int | None] = dict.fromkeys(layers)
    for layer in layers:
        for metrics in reversed(evaluations(curve)):
            if metrics[f"eval_cosine_layer_{layer}"] >= COLLAPSED:
                break
            found[layer] = int(metrics["step"])
    return found


def unsettled(curve: Curve, layers: Sequence[int], limit: float = STILL_FALLING) -> str | None:
    """Why a run is not converged at the end of its curve, in a few words; empty where it is, None where nothing tells.

    It is not where some layers have collapsed and others have not, or where its rerouting still grew over its last
    fifth by more than `limit` of what it achieved. Where held-out evaluations lie too far apart for that, the training
    loss tells it, averaged over its last two tenths.
    """
    steps = collapse_steps(curve, layers)
    waiting = [layer for layer, step in steps.items() if step is None]
    if waiting and len(waiting) < len(layers):
        cosines = evaluations(curve)[-1]
        named = " and ".join(
            f"layer {layer} at cosine {cosines[f'eval_cosine_layer_{layer}']:.2f}" for layer in waiting
        )
        return f"{named} while others have collapsed"
    pair = _before_and_last(curve)
    if pair is None:
        return None
    before, last = pair
    if before - last > limit * (1 - last):
        return f"reroute still fell from {before:.3f} to {last:.3f} over the last fifth"
    return ""


def _before_and_last(curve: Curve) -> tuple[float, float] | None:
    """The reroute loss about a fifth of the steps before the end, and at the end; None where that is not known."""
    if not curve:
        return None
    end = curve[-1]["step"]
    held_out = [(metrics["step"], metrics["eval_loss_reroute"]) for metrics in evaluations(curve)]
    earlier = [loss for step, loss in held_out if end * (1 - 2 * LAST) <= step <= end * (1 - LAST)]
    if earlier and held_out[-1][0] == end:
        return earlier[-1], held_out[-1][1]
    batches = [(metrics["step"], metrics["loss_reroute"]) for metrics in curve]
    tenth = end * LAST / 2
    last = [loss for step, loss in batches if step > end - tenth]
    before = [loss for step, loss in batches if end - end * LAST - tenth < step <= end - end * LAST]
    return (sum(before) / len(before), sum(last) / len(last)) if before and last else None


def convergence_metrics(curve: Curve, layers: Sequence[int], limit: float = STILL_FALLING) -> dict[str, float]:
    """`converged` (1 or 0) and `collapse_step_layer_K`, without what the curve does not tell."""
    steps = {f"collapse_step_layer_{layer}": step for layer, step in collapse_steps(curve, layers).items()}
    collapsed = {name: float(step) for name, step in steps.items() if step is not None}
    why = unsettled(curve, layers, limit)
    return collapsed if why is None else {"converged": float(not why), **collapsed}
