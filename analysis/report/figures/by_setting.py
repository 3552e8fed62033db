"""Drift and rerouting lost over beta_kl: the trials, and the model's lines between them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.decision import Decision
from analysis.formatting import number, signed, temperature
from analysis.report.figures.evidence import ZOOM
from analysis.report.figures.style import (
    ACCENT,
    BEYOND,
    HEAT,
    MUTED,
    Numbers,
    Width,
    legend,
    log_scale,
    nothing,
    panels,
    say,
)
from analysis.report.tables import measured_loss, sound_trials
from analysis.surrogate.kernel import Array, coordinates
from analysis.surrogate.surrogate import MIN_DRIFT, Surrogate

_MARKS, _DASHES = ("o", "s", "D"), ("-", (0, (6, 2)), (0, (2, 2)))
_POINTS = 48


@dataclass(frozen=True)
class Band:
    """The trials of neighbouring temperatures, and the model along one of them."""

    label: str
    temperature: float
    """Where the model's line is: the median of the trials'."""
    beta_kl: Array
    drift: Array
    lost: Array
    """`[n]` each, of the trials."""
    line: Array
    """`[m]` weights of the lines below."""
    line_drift: Array
    line_lost: Array
    """`[3, m]`: posterior mean, and the ends of the 95 % interval."""


@dataclass(frozen=True)
class BySetting:
    """Both held-out metrics against beta_kl."""

    bands: tuple[Band, ...]
    tolerance: float | None
    baseline_drift: Array
    """`[b]` of each baseline trial."""
    chosen: tuple[float, float, float, float] | None
    """Weight, temperature, posterior drift and rerouting lost of the pick."""


def prepare_by_setting(trials: pd.DataFrame, decision: Decision, model: Surrogate | None) -> BySetting:
    """Trials by bands of temperature, with the model's lines where there is a model."""
    sound = sound_trials(trials, decision)
    baselines, rows = sound[sound["beta_kl"] == 0], sound[sound["beta_kl"] > 0]
    rows = rows.assign(lost=measured_loss(rows, trials, decision))
    chosen = None
    if decision.verdict == "choose":
        chosen = (decision.beta_kl, decision.kl_temperature, decision.eval_benign_kl, decision.reroute_delta)
    return BySetting(
        bands=tuple(_band(label, part, decision, model) for label, part in _by_temperature(rows)),
        tolerance=decision.tolerance,
        baseline_drift=baselines["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT),
        chosen=chosen,  # type: ignore[arg-type]
    )


def _by_temperature(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows in at most three parts of like temperature, the coldest first."""
    heat = rows["kl_temperature"].astype(float)
    cold, hot = heat.min(), heat.max()
    if rows.empty or cold == hot:
        return [(f"T {temperature(cold)}", rows)] if not rows.empty else []
    edges = np.linspace(cold, hot, len(HEAT) + 1)
    part = np.clip(np.searchsorted(edges, heat, side="right") - 1, 0, len(HEAT) - 1)
    named = []
    for i in range(len(HEAT)):
        own = rows[part == i]
        if not own.empty:
            low, high = own["kl_temperature"].min(), own["kl_temperature"].max()
            label = f"T {temperature(low)}" + ("" if low == high else f"–{temperature(high)}")
            named.append((label, own))
    return named


def _band(label: str, rows: pd.DataFrame, decision: Decision, model: Surrogate | None) -> Band:
    beta_kl = rows["beta_kl"].to_numpy(float)
    heat = float(np.median(rows["kl_temperature"].astype(float)))
    low, high = decision.searched.beta_kl
    line = np.geomspace(min(low, beta_kl.min()), max(high, beta_kl.max()), _POINTS)
    drift = lost = np.empty((3, 0))
    if model is None or decision.baseline is None:
        line = line[:0]
    else:
        points = coordinates(line, np.full(_POINTS, heat), decision.searched)
        of_drift, of_lost = model.drift.value(points), model.lost(points)
        drift, lost = (
            np.stack([each.expectation(), each.quantile(0.025), each.quantile(0.975)]) for each in (of_drift, of_lost)
        )
        drift, lost = np.exp(drift), lost * decision.baseline.achieved
    own_drift = rows["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT)
    return Band(label, heat, beta_kl, own_drift, rows["lost"].to_numpy(float), line, drift, lost)


def draw_by_setting(data: BySetting, width: Width) -> Figure:
    """Two panels over beta_kl, a colour, a mark and a line a temperature band, the baseline a grey band."""
    narrow = width == "narrow"
    figure, (upper, lower) = panels(width, [190, 190] if narrow else [220, 220], top=44 if narrow else 26)
    if not data.bands:
        return nothing(figure, upper, "no completed trial with beta_kl above 0")
    shaded = _shaded(data)
    for band, colour, mark, dash in zip(data.bands, HEAT, _MARKS, _DASHES, strict=False):
        for axes, y, line in ((upper, band.drift, band.line_drift), (lower, band.lost, band.line_lost)):
            if line.size:
                axes.plot(band.line, line[0], color=colour, linewidth=1.6, linestyle=dash, zorder=3)
                if band is shaded:
                    axes.fill_between(band.line, line[1], line[2], color=colour, alpha=0.14, linewidth=0, zorder=1)
            axes.scatter(band.beta_kl, y, s=30, marker=mark, color=colour, zorder=4, label=band.label)
    if len(data.baseline_drift):
        low, high = data.baseline_drift.min(), data.baseline_drift.max()
        upper.axhspan(low, high, color=MUTED, alpha=0.18, linewidth=0)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "top", "ha": "right"}
        say(upper, "without KL", (1, high), (-4, -3), color=MUTED, **place)
    every = np.concatenate([*(band.beta_kl for band in data.bands), *(band.line for band in data.bands)])
    drifts = np.concatenate([*(band.drift for band in data.bands), data.baseline_drift])
    log_scale(upper, "x", every.min() * 0.85, every.max() * 1.18)
    log_scale(lower, "x", every.min() * 0.85, every.max() * 1.18)
    log_scale(upper, "y", drifts.min() / 1.6, drifts.max() * 1.6)
    _lost_axis(lower, data)
    if data.chosen is not None:
        beta_kl, _, drift, lost = data.chosen
        for axes, at in ((upper, drift), (lower, lost)):
            axes.scatter([beta_kl], [at], s=150, facecolors="none", edgecolors=ACCENT, linewidths=2, zorder=6)
    upper.set_ylabel("benign drift, nats/token", labelpad=2)
    lower.set_ylabel("rerouting lost", labelpad=2)
    lower.set_xlabel("beta_kl")
    upper.tick_params(labelbottom=False)
    legend(upper, 2 if narrow else 3)
    return figure


def _shaded(data: BySetting) -> Band:
    """The band whose interval is shown, since three on top of each other tell nothing: the one the pick is of."""
    if data.chosen is None:
        return data.bands[0]
    heat = data.chosen[1]
    return min(data.bands, key=lambda band: abs(band.temperature - heat))


def _lost_axis(axes: Axes, data: BySetting) -> None:
    """The limit, the forbidden side, and arrows at the edge for what lies beyond three limits."""
    lost = np.concatenate([band.lost for band in data.bands])
    if data.tolerance is None:
        return
    low, high = min(float(lost.min()), 0.0), float(lost.max())
    top = min(max(high, 1.5 * data.tolerance), ZOOM * data.tolerance) + 0.15 * data.tolerance
    axes.set_ylim(max(low, -data.tolerance) - 0.15 * data.tolerance, top)
    axes.axhspan(data.tolerance, top, color=BEYOND, alpha=0.07, linewidth=0, zorder=0)
    axes.axhline(data.tolerance, color=BEYOND, linewidth=1.2, linestyle=(0, (5, 3)))
    text = f"limit {number(data.tolerance, 2)}"
    say(axes, text, (0, data.tolerance), (5, 3), xycoords=("axes fraction", "data"), color=BEYOND)
    for band, colour in zip(data.bands, HEAT, strict=False):
        beyond = band.beta_kl[band.lost > top]
        axes.scatter(beyond, np.full(len(beyond), top), s=46, marker="^", color=colour, clip_on=False, zorder=6)


def numbers_of_by_setting(data: BySetting) -> Numbers:
    """The model's lines at a handful of weights, a row a weight and band."""
    rows = []
    for band in data.bands:
        for i in np.unique(np.linspace(0, len(band.line) - 1, 7).astype(int)) if len(band.line) else ():
            drift, lost = band.line_drift[:, i], band.line_lost[:, i]
            rows.append(
                (
                    temperature(band.temperature),
                    number(band.line[i], 2),
                    f"{number(drift[0])} [{number(drift[1], 2)}, {number(drift[2], 2)}]",
                    f"{signed(lost[0])} [{signed(lost[1])}, {signed(lost[2])}]",
                )
            )
    return Numbers(("T", "beta_kl", "model: drift [95 %]", "model: rerouting lost [95 %]"), tuple(rows))
