"""The report's figures, each in two: a function that prepares typed data, and one that draws it.

Drawn off screen as SVG, without dates and with fixed ids: the same sweep gives the same bytes.
"""

import io
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from analysis.decision import Decision
from analysis.formatting import number, temperature
from analysis.surrogate.kernel import Array
from analysis.surrogate.surrogate import MIN_DRIFT, finite_trials

ACCENT = "#0b6bcb"
INK = "#222222"
MUTED = "#8a8a8a"
_FORBIDDEN = "#f1f1f1"
_MARKS = {"baseline": "s", "ablation": "D", "search": "o", "confirm": "^"}
_SCALE = LinearSegmentedColormap.from_list("accent", ["#c3c3c3", ACCENT, "#062a52"])
_STYLE = {
    "svg.hashsalt": "circuit-breaker-kl-sweep",
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Tradeoff:
    """Drift against rerouting lost, a point a completed trial."""

    lost: Array
    """`[n]` `eval_loss_reroute` minus the baseline's of the same seed, or its mean."""
    drift: Array
    """`[n]` `eval_benign_kl`, nats per token."""
    phase: tuple[str, ...]
    tolerance: float | None
    """The allowed loss; None without a baseline, when nothing can be compared."""
    chosen: tuple[float, float] | None
    """(rerouting lost, drift) that the model gives for the pick; None without one."""
    chosen_interval: tuple[float, float] | None
    """95 % interval of the pick's rerouting lost."""
    chosen_label: str


@dataclass(frozen=True)
class BySetting:
    """Both held-out metrics against beta_kl, a point a completed trial with `beta_kl` > 0."""

    beta_kl: Array
    kl_temperature: Array
    drift: Array
    loss_reroute: Array
    baseline_drift: Array
    """`[b]` drift of each baseline trial."""
    baseline_loss_reroute: Array
    limit: float | None
    """Highest `eval_loss_reroute` that is allowed."""
    chosen: tuple[float, float] | None
    """(beta_kl, kl_temperature) of the pick."""
    temperatures: tuple[float, float]
    """Lowest and highest `kl_temperature` that was searched or ran; equal where there is but one."""


@dataclass(frozen=True)
class Curve:
    """Training `loss_reroute` of one trial over its steps."""

    trial_id: str
    beta_kl: float
    step: Array
    loss_reroute: Array


def prepare_tradeoff(trials: pd.DataFrame, decision: Decision) -> Tradeoff:
    """Trials as drift against rerouting lost; empty without a baseline."""
    usable, _ = finite_trials(trials)
    suspect = {each.trial_id for each in decision.suspects}
    baselines = usable[(usable["beta_kl"] == 0) & ~usable["trial_id"].isin(suspect)]
    paired = baselines.groupby("seed")["eval_loss_reroute"].mean()
    if baselines.empty:
        usable = usable.iloc[:0]
    reference = usable["seed"].map(paired).astype(float).fillna(baselines["eval_loss_reroute"].mean())
    chosen = label = None
    if decision.verdict == "choose" and decision.reroute_delta is not None and decision.eval_benign_kl is not None:
        chosen = (decision.reroute_delta, decision.eval_benign_kl)
        label = f"beta_kl {number(decision.beta_kl or 0)}, T {temperature(decision.kl_temperature or 1)}"
    return Tradeoff(
        lost=(usable["eval_loss_reroute"] - reference).to_numpy(float),
        drift=usable["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT),
        phase=tuple(usable["phase"]) if "phase" in usable else ("search",) * len(usable),
        tolerance=decision.tolerance,
        chosen=chosen,
        chosen_interval=decision.reroute_delta_interval if chosen else None,
        chosen_label=label or "",
    )


def prepare_by_setting(trials: pd.DataFrame, decision: Decision) -> BySetting:
    """Both metrics by beta_kl, and the baseline's own."""
    usable, _ = finite_trials(trials)
    baselines, rows = usable[usable["beta_kl"] == 0], usable[usable["beta_kl"] > 0]
    limit = None
    if decision.baseline is not None and decision.tolerance is not None:
        limit = decision.baseline.eval_loss_reroute + decision.tolerance
    chosen = None
    if decision.verdict == "choose" and decision.beta_kl is not None and decision.kl_temperature is not None:
        chosen = (decision.beta_kl, decision.kl_temperature)
    temperatures = [*decision.searched.kl_temperature, *rows["kl_temperature"].astype(float)]
    return BySetting(
        beta_kl=rows["beta_kl"].to_numpy(float),
        kl_temperature=rows["kl_temperature"].to_numpy(float),
        drift=rows["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT),
        loss_reroute=rows["eval_loss_reroute"].to_numpy(float),
        baseline_drift=baselines["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT),
        baseline_loss_reroute=baselines["eval_loss_reroute"].to_numpy(float),
        limit=limit,
        chosen=chosen,
        temperatures=(min(temperatures), max(temperatures)),
    )


def prepare_curves(curves: pd.DataFrame, trials: pd.DataFrame) -> tuple[Curve, ...]:
    """Each trial's training `loss_reroute` over steps, the baselines last so that they are drawn on top."""
    if "loss_reroute" not in curves:
        return ()
    beta = dict(zip(trials["trial_id"], trials["beta_kl"], strict=True))
    prepared = []
    for trial_id, rows in curves.groupby("trial_id"):
        rows = rows[np.isfinite(rows["loss_reroute"].astype(float))].sort_values("step")
        if trial_id in beta and not rows.empty:
            steps, losses = rows["step"].to_numpy(float), rows["loss_reroute"].to_numpy(float)
            prepared.append(Curve(str(trial_id), float(beta[trial_id]), steps, losses))
    return tuple(sorted(prepared, key=lambda curve: (curve.beta_kl == 0, curve.beta_kl)))


def draw_tradeoff(data: Tradeoff) -> str:
    """SVG: the forbidden side shaded, the pick ringed with its interval, the baseline labelled."""
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _figure(1, height=4.6)
        if not len(data.lost) or data.tolerance is None:
            return _nothing(figure, axes, "no completed baseline to compare with")
        _log_scale(axes, "y")
        for phase, mark in _MARKS.items():
            here = np.array([name == phase for name in data.phase])
            if here.any():
                colour = MUTED if phase == "baseline" else INK
                face = "none" if phase in ("ablation", "confirm") else colour
                at = data.lost[here], data.drift[here]
                axes.scatter(*at, s=42, marker=mark, facecolors=face, edgecolors=colour, label=phase, zorder=3)
        left, right = min(float(data.lost.min()), 0.0), max(float(data.lost.max()), data.tolerance)
        pad = 0.06 * (right - left)
        axes.set_xlim(left - pad, right + 2 * pad)
        axes.axvspan(data.tolerance, right + 2 * pad, color=_FORBIDDEN, zorder=0)
        axes.axvline(data.tolerance, color=INK, linewidth=1, linestyle="--", zorder=1)
        at_top = {"xycoords": ("data", "axes fraction"), "va": "top"}
        _say(axes, f"limit {number(data.tolerance)}", (data.tolerance, 1), (5, -2), **at_top)
        baseline = data.drift[np.array([name == "baseline" for name in data.phase])]
        if len(baseline):
            _say(axes, "beta_kl = 0", (0, float(np.median(baseline))), (12, 0), color=MUTED, va="center")
        if data.chosen is not None and data.chosen_interval is not None:
            _ring(axes, data.chosen, data.chosen_interval, data.chosen_label)
        axes.set_xlabel("rerouting lost against the baseline (held-out loss_reroute)")
        axes.set_ylabel("benign drift (KL, nats per token)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, handletextpad=0.2)
        return _svg(figure)


def draw_by_setting(data: BySetting) -> str:
    """SVG of two panels over beta_kl, coloured by temperature if there are several; baseline a band, limit a line."""
    with matplotlib.rc_context(_STYLE):
        figure, (upper, lower) = _figure(2, height=6.2)
        if not len(data.beta_kl):
            lower.set_axis_off()
            return _nothing(figure, upper, "no completed trial with beta_kl above 0")
        cold, hot = data.temperatures
        heat = {"c": data.kl_temperature, "cmap": _SCALE, "vmin": cold, "vmax": hot} if cold < hot else {"color": INK}
        for axes, y, baseline in (
            (upper, data.drift, data.baseline_drift),
            (lower, data.loss_reroute, data.baseline_loss_reroute),
        ):
            marks = axes.scatter(data.beta_kl, y, s=42, zorder=3, **heat)
            if len(baseline):
                axes.axhspan(baseline.min(), baseline.max(), color=MUTED, alpha=0.25, linewidth=0)
                axes.axhline(np.median(baseline), color=MUTED, linewidth=1)
            if data.chosen is not None:
                here = (data.beta_kl == data.chosen[0]) & (data.kl_temperature == data.chosen[1])
                axes.scatter(data.beta_kl[here], y[here], s=150, facecolors="none", edgecolors=ACCENT, linewidths=2)
        _log_scale(upper, "y")
        _log_scale(lower, "x")
        if data.beta_kl.max() < 10 * data.beta_kl.min():  # within a decade Matplotlib writes all nine as powers of ten
            lower.xaxis.set_major_locator(MaxNLocator(6))
            lower.xaxis.set_minor_locator(NullLocator())
        single = "" if cold < hot else f" · kl_temperature {temperature(cold)} throughout"
        title = f"grey band: the baseline (beta_kl = 0) · ring: the pick{single}"
        upper.set_title(title, fontsize=10, loc="left")
        upper.set_ylabel("benign drift\n(KL, nats per token)")
        lower.set_ylabel("held-out loss_reroute\n(mean ReLU cosine)")
        lower.set_xlabel("beta_kl")
        if data.limit is not None:
            lower.axhline(data.limit, color=INK, linewidth=1, linestyle="--")
            _say(lower, f"limit {number(data.limit)}", (0, data.limit), (4, 3), xycoords=("axes fraction", "data"))
        if cold < hot:
            figure.colorbar(marks, ax=[upper, lower], label="kl_temperature", fraction=0.04, pad=0.02)
        return _svg(figure)


def draw_curves(curves: tuple[Curve, ...]) -> str:
    """SVG: training `loss_reroute` over steps, coloured by beta_kl, the baseline dashed."""
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _figure(1, height=4.2)
        if not curves:
            return _nothing(figure, axes, "no metrics.jsonl of any trial")
        betas = [curve.beta_kl for curve in curves if curve.beta_kl > 0] or [1e-3]
        norm = LogNorm(min(betas) / 1.01, max(betas) * 1.01)
        label = "beta_kl = 0"
        with_kl = [curve for curve in curves if curve.beta_kl > 0]
        # One collection: of a thousand lines each by itself takes seconds.
        lines = [np.column_stack([curve.step, curve.loss_reroute]) for curve in with_kl]
        colors = [_SCALE(norm(curve.beta_kl)) for curve in with_kl]
        axes.add_collection(LineCollection(lines, colors=colors, linewidths=1.3))
        axes.autoscale_view()
        for curve in curves:
            if curve.beta_kl == 0:
                axes.plot(curve.step, curve.loss_reroute, color=INK, linewidth=1.1, linestyle="--", label=label)
                label = "_repeated"
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step (optimizer updates)")
        axes.set_ylabel("training loss_reroute (mean ReLU cosine)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right")
        figure.colorbar(matplotlib.cm.ScalarMappable(norm, _SCALE), ax=axes, label="beta_kl", fraction=0.04, pad=0.02)
        return _svg(figure)


def _figure(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(panels[:, 0])


def _log_scale(axes: Axes, axis: Literal["x", "y"]) -> None:
    """A logarithmic axis whose labels are plain numbers."""
    axes.set(**{f"{axis}scale": "log"})
    getattr(axes, f"{axis}axis").set_major_formatter(lambda value, _: number(value))


def _say(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text at a point, moved by `offset` points."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **{"color": INK, "zorder": 6, **style})


def _ring(axes: Axes, at: tuple[float, float], interval: tuple[float, float], label: str) -> None:
    axes.plot(interval, (at[1], at[1]), color=ACCENT, linewidth=2, solid_capstyle="butt", zorder=4)
    axes.scatter(*at, s=190, facecolors="none", edgecolors=ACCENT, linewidths=2.4, zorder=5)
    ground = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    _say(axes, label, at, (0, -16), color=ACCENT, fontweight="bold", ha="center", va="top", bbox=ground)


def _nothing(figure: Figure, axes: Axes, why: str) -> str:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()
