"""The map: where over beta_kl and kl_temperature the limit is kept, with the settings that ran."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis.decision import Decision
from analysis.formatting import number, probability, temperature
from analysis.report.figures.labels import Label, place
from analysis.report.figures.style import ACCENT, INK, PAGE, Numbers, Width, legend, log_scale, panels
from analysis.surrogate.kernel import Array, coordinates
from analysis.surrogate.surrogate import Surrogate

_GRID = (31, 16)
"""Weights and temperatures at which it is reckoned."""


@dataclass(frozen=True)
class SettingsMap:
    """The probability of keeping the limit over both parameters."""

    beta_kl: Array
    kl_temperature: Array
    """`[m]` and `[k]` axes of the grid."""
    probability: Array
    """`[k, m]`."""
    confidence: float
    settings: tuple[tuple[float, float, float, bool], ...]
    """Weight, temperature, P, whether it qualifies, of each setting that ran."""
    chosen: tuple[float, float] | None


def prepare_map(decision: Decision, model: Surrogate | None) -> SettingsMap | None:
    """P over the searched ranges; None without a model or at a single temperature."""
    if model is None or decision.searched.single_temperature or not decision.settings:
        return None
    beta_kl = np.geomspace(*decision.searched.beta_kl, _GRID[0])
    heat = np.linspace(*decision.searched.kl_temperature, _GRID[1])
    at_heat, at_beta = (grid.ravel() for grid in np.meshgrid(heat, beta_kl, indexing="ij"))
    chance = model.probability_feasible(coordinates(at_beta, at_heat, decision.searched)).reshape(len(heat), -1)
    chosen = None
    if decision.verdict == "choose" and decision.beta_kl is not None and decision.kl_temperature is not None:
        chosen = decision.beta_kl, decision.kl_temperature
    settings = tuple(
        (each.beta_kl, each.kl_temperature, each.probability_feasible, each.qualifies and not each.complaints)
        for each in decision.settings
    )
    return SettingsMap(beta_kl, heat, chance, decision.confidence, settings, chosen)


def title_of(data: SettingsMap) -> str:
    """What the map shows, or that nothing of it is shaded."""
    asked = f"P ≥ {number(data.confidence)}"
    if data.probability.max() < data.confidence:
        return f"Nowhere on the map is the limit kept with {asked}"
    return f"Where the limit is kept: {asked} is shaded, P = 0.5 dashed"


def draw_map(data: SettingsMap, width: Width) -> Figure:
    """The region that keeps the limit shaded, its border at the confidence and at one half, settings as points."""
    narrow = width == "narrow"
    figure, (axes,) = panels(width, [220 if narrow else 240], top=44 if narrow else 26)
    axes.contourf(
        data.beta_kl, data.kl_temperature, data.probability, [data.confidence, 1.1], colors=[ACCENT], alpha=0.14
    )
    for level, dash in ((data.confidence, "-"), (0.5, (0, (4, 3)))):
        if data.probability.min() < level < data.probability.max():
            lines = axes.contour(data.beta_kl, data.kl_temperature, data.probability, [level], colors=[ACCENT])
            lines.set(linewidth=1.4, linestyle=dash)
    for qualifies, label, face in ((True, "candidate", INK), (False, "loses too much, unsure, or misbehaves", PAGE)):
        at = [(beta, heat) for beta, heat, _, ok in data.settings if ok == qualifies]
        if at:
            beta_kl, heat = zip(*at, strict=True)
            axes.scatter(beta_kl, heat, s=34, facecolors=face, edgecolors=INK, zorder=4, label=label)
    everything = [beta for beta, *_ in data.settings] + data.beta_kl.tolist()
    log_scale(axes, "x", min(everything) * 0.85, max(everything) * 1.18)
    heats = [heat for _, heat, *_ in data.settings] + data.kl_temperature.tolist()
    pad = 0.05 * (max(heats) - min(heats))
    axes.set_ylim(min(heats) - pad, max(heats) + pad)
    if data.chosen is not None:
        axes.scatter(*data.chosen, s=150, facecolors="none", edgecolors=ACCENT, linewidths=2, zorder=5)
        name = f"pick: {number(data.chosen[0])}, T {temperature(data.chosen[1])}"
        place(
            axes, [Label(name, *data.chosen, ACCENT, bold=True)], [(beta, heat) for beta, heat, *_ in data.settings], []
        )
    axes.set_xlabel("beta_kl")
    axes.set_ylabel("kl_temperature", labelpad=2)
    legend(axes, 1 if narrow else 2)
    return figure


def numbers_of_map(data: SettingsMap) -> Numbers:
    """P on a coarse grid: a row a temperature, a column a weight."""
    columns = np.linspace(0, len(data.beta_kl) - 1, 7).astype(int)
    rows = np.linspace(0, len(data.kl_temperature) - 1, 4).astype(int)
    header = ("P(within limit) at T", *(f"beta_kl {number(data.beta_kl[i], 2)}" for i in columns))
    values = tuple(
        (temperature(data.kl_temperature[j]), *(probability(data.probability[j, i]) for i in columns)) for j in rows
    )
    return Numbers(header, values)
