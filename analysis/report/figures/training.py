"""Was the baseline any good: rerouting over steps, gradients of the three terms, cosine by layer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from analysis.decision import Decision
from analysis.formatting import number
from analysis.report.figures.style import ACCENT, INK, MUTED, Numbers, Width, legend, log_scale, nothing, panels
from analysis.surrogate.kernel import Array

_LAYER = re.compile(r"eval_cosine_layer_(\d+)$")
_TERMS: dict[str, Any] = {"reroute": "-", "retain": (0, (6, 2)), "kl": (0, (2, 2))}
_LOOKS = {"baseline": (INK, "without KL", "s"), "pick": (ACCENT, "pick", "o")}
_FAINT, _FAINT_POINTS, _POINTS = 200, 60, 300
"""Trials that are neither baseline nor pick, drawn at most; and points of theirs, and of the others."""


@dataclass(frozen=True)
class Curve:
    """One trial over its steps."""

    trial_id: str
    beta_kl: float
    kind: str
    """`baseline`, `pick` or `other`."""
    step: Array
    loss_reroute: Array
    collapse: Array
    """Steps at which its layers collapsed, one a layer that did."""


@dataclass(frozen=True)
class Layers:
    """Mean cosine on held-out harmful text at the end, by layer, of each trial of one kind."""

    kind: str
    layer: tuple[int, ...]
    cosine: Array
    """`[trials, layers]`."""


@dataclass(frozen=True)
class Gradients:
    """Norms of each term's gradient over steps, means over the trials of a kind."""

    kind: str
    step: Array
    norm: dict[str, Array] = field(default_factory=dict)
    """By term."""


@dataclass(frozen=True)
class Training:
    """What training did, of the baseline and the pick."""

    curves: tuple[Curve, ...]
    layers: tuple[Layers, ...]
    gradients: tuple[Gradients, ...]


def prepare_training(curves: pd.DataFrame, trials: pd.DataFrame, decision: Decision) -> Training:
    """Curves of all trials, baselines and pick last so that they lie on top; layers and gradients of these two."""
    kinds = {row.trial_id: _kind(row.beta_kl, row.kl_temperature, decision) for row in trials.itertuples()}
    layers, gradients = [], []
    for kind in ("baseline", "pick"):
        own = [trial_id for trial_id, of in kinds.items() if of == kind]
        rows = trials[trials["trial_id"].isin(own) & (trials["status"] == "completed")]
        names = sorted((int(found[1]), name) for name in trials if (found := _LAYER.match(str(name))))
        if names and not rows.empty:
            values = rows[[name for _, name in names]].astype(float).to_numpy()
            layers.append(Layers(kind, tuple(layer for layer, _ in names), values))
        gradients += _gradients(kind, curves[curves["trial_id"].isin(own)])
    return Training(_curves(curves, trials, kinds), tuple(layers), tuple(gradients))


def _kind(beta_kl: float, heat: float, decision: Decision) -> str:
    if beta_kl == 0:
        return "baseline"
    return "pick" if decision.chose(beta_kl, heat) else "other"


def _curves(curves: pd.DataFrame, trials: pd.DataFrame, kinds: dict[str, str]) -> tuple[Curve, ...]:
    if "loss_reroute" not in curves:
        return ()
    by_id = trials.set_index("trial_id")
    collapse = [name for name in trials if str(name).startswith("collapse_step_layer_")]
    order = {"other": 0, "baseline": 1, "pick": 2}
    prepared = []
    for trial_id, rows in curves.groupby("trial_id"):
        rows = rows[np.isfinite(rows["loss_reroute"].astype(float))].sort_values("step")
        if trial_id not in kinds or rows.empty:
            continue
        own = by_id.loc[trial_id]
        fell = np.array(own[collapse], dtype=float) if collapse else np.empty(0)
        steps, losses = rows["step"].to_numpy(float), rows["loss_reroute"].to_numpy(float)
        kind = kinds[str(trial_id)]
        prepared.append(Curve(str(trial_id), float(own["beta_kl"]), kind, steps, losses, fell[np.isfinite(fell)]))
    return tuple(sorted(prepared, key=lambda curve: (order[curve.kind], curve.beta_kl, curve.trial_id)))


def _gradients(kind: str, rows: pd.DataFrame) -> list[Gradients]:
    names = {term: f"grad_norm_{term}" for term in _TERMS if f"grad_norm_{term}" in rows}
    rows = rows.dropna(subset=list(names.values())) if names else rows.iloc[:0]
    if rows.empty:
        return []
    mean = rows.groupby("step")[list(names.values())].mean()
    return [Gradients(kind, mean.index.to_numpy(float), {term: mean[name].to_numpy() for term, name in names.items()})]


def draw_curves(curves: Sequence[Curve], width: Width) -> Figure:
    """Training `loss_reroute` over steps: baselines dashed, the pick bold, others faint; ticks where layers fell."""
    narrow = width == "narrow"
    figure, (axes,) = panels(width, [210 if narrow else 240], top=44 if narrow else 26)
    if not curves:
        return nothing(figure, axes, "no metrics.jsonl of any trial")
    others = [curve for curve in curves if curve.kind == "other"]
    some = [others[i] for i in np.unique(np.linspace(0, len(others) - 1, min(len(others), _FAINT)).astype(int))]
    lines = [np.column_stack(_thinned(curve, _FAINT_POINTS)) for curve in some]
    if lines:  # one collection: of a thousand lines each by itself takes seconds
        axes.add_collection(LineCollection(lines, colors=MUTED, linewidths=0.8, alpha=0.35, label="other settings"))
    axes.autoscale_view()
    looks: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("baseline", {"color": INK, "linewidth": 1.3, "linestyle": (0, (5, 2))}, "without KL"),
        ("pick", {"color": ACCENT, "linewidth": 2.2}, "pick"),
    )
    for kind, look, label in looks:
        own = [curve for curve in curves if curve.kind == kind]
        for i, curve in enumerate(own):
            axes.plot(*_thinned(curve, _POINTS), label="_" if i else label, zorder=3, **look)
        fell = np.concatenate([curve.collapse for curve in own]) if own else np.empty(0)
        if len(fell):
            height = 0.035 if kind == "baseline" else 0.0
            axes.plot(
                np.unique(fell),
                np.full(len(np.unique(fell)), height),
                "|",
                color=look["color"],
                markersize=9,
                markeredgewidth=2,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=5,
            )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step (ticks: a layer has collapsed)")
    axes.set_ylabel("training loss_reroute", labelpad=2)
    legend(axes, 2 if narrow else 3)
    return figure


def _thinned(curve: Curve, most: int) -> tuple[Array, Array]:
    """At most so many points of a curve, first and last among them."""
    at = np.unique(np.linspace(0, len(curve.step) - 1, min(len(curve.step), most)).astype(int))
    return curve.step[at], curve.loss_reroute[at]


def numbers_of_curves(curves: Sequence[Curve]) -> Numbers:
    """Training loss_reroute at six places of baselines and pick, and where their layers collapsed."""
    rows = []
    for curve in curves:
        if curve.kind != "other":
            at = np.unique(np.linspace(0, len(curve.step) - 1, 6).astype(int))
            course = " → ".join(f"{number(curve.loss_reroute[i], 2)} ({curve.step[i]:.0f})" for i in at)
            fell = ", ".join(f"{step:.0f}" for step in sorted(curve.collapse)) or "–"
            rows.append((curve.trial_id, curve.kind, course, fell))
    return Numbers(("trial", "what it is", "loss_reroute (at step)", "layers collapsed at step"), tuple(rows))


def draw_layers(data: Training, width: Width) -> Figure:
    """Cosine by layer at the end, and the gradient's norms of the three terms over steps."""
    narrow = width == "narrow"
    heights, columns = ([180, 180], 1) if narrow else ([220], 2)
    figure, (left, right) = panels(width, heights, columns=columns, top=28, gap=72)
    if not data.layers and not data.gradients:
        return nothing(figure, left, "no metrics by layer")
    _draw_cosines(left, data.layers)
    _draw_gradients(right, data.gradients)
    return figure


def _draw_cosines(axes: Axes, layers: Sequence[Layers]) -> None:
    for shift, each in zip((-0.1, 0.1), layers, strict=False):
        colour, label, mark = _LOOKS[each.kind]
        for i, cosines in enumerate(each.cosine.T):
            x, named = np.full(len(cosines), i + shift), label if i == 0 else "_"
            axes.scatter(x, cosines, s=26, color=colour, marker=mark, label=named, zorder=3, alpha=0.85)
    if layers:
        names = [str(layer) for layer in layers[0].layer]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(-1.05, 1.05)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        legend(axes, 2)
    axes.set_ylabel("cosine, held-out harmful", labelpad=2)
    axes.set_xlabel("target layer")


def _draw_gradients(axes: Axes, gradients: Sequence[Gradients]) -> None:
    named, every = set(), np.concatenate([np.empty(0), *(norm for each in gradients for norm in each.norm.values())])
    for each in gradients:
        for term, dash in _TERMS.items():
            norm = each.norm.get(term, np.empty(0))
            if (norm > 0).any():  # without KL its gradient is 0, which has no place on a logarithmic axis
                look = {"color": _LOOKS[each.kind][0], "linestyle": dash, "marker": "."}
                axes.plot(each.step, np.where(norm > 0, norm, np.nan), label="_" if term in named else term, **look)
                named.add(term)
    positive = every[every > 0]
    if len(positive):
        log_scale(axes, "y", positive.min() / 1.5, positive.max() * 1.5)
        legend(axes, 3)
    axes.set_ylabel("gradient norm", labelpad=2)
    axes.set_xlabel("step")


def numbers_of_layers(data: Training) -> Numbers:
    rows = []
    for of_layers in data.layers:
        for i, layer in enumerate(of_layers.layer):
            values = of_layers.cosine[:, i]
            spread = f"{number(values.min(), 2)} to {number(values.max(), 2)}"
            rows.append((of_layers.kind, f"cosine, layer {layer}", f"{number(float(values.mean()), 2)} ({spread})"))
    for of_kind in data.gradients:
        for term, norm in of_kind.norm.items():
            course = " → ".join(
                f"{number(value, 2)} ({step:.0f})" for step, value in zip(of_kind.step, norm, strict=True)
            )
            rows.append((of_kind.kind, f"gradient norm, {term}", course))
    return Numbers(("what it is", "metric", "value (range over seeds, or step)"), tuple(rows))
