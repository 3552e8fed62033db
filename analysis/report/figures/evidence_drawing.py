"""The evidence, drawn: what `evidence.py` prepares."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from analysis.formatting import number
from analysis.report.figures.evidence import ZOOM, Evidence
from analysis.report.figures.labels import Label, place
from analysis.report.figures.style import (
    ACCENT,
    BEYOND,
    INK,
    MUTED,
    PAGE,
    Width,
    legend,
    log_scale,
    nothing,
    panels,
    renderer_of,
)
from analysis.surrogate.kernel import Array

_MARKS = {"baseline": "s", "ablation": "D", "search": "o", "confirm": "^"}
_MOST_BARS = 40
"""Settings whose interval is drawn; of more the least drifting, since all would be a grey field."""


def draw_evidence(data: Evidence, width: Width) -> Figure:
    """The forbidden side shaded, the pick ringed with its interval, what lies off the scale as arrows at the edge."""
    narrow = width == "narrow"
    columns = 2 if narrow else 4
    figure, (axes,) = panels(width, [330 if narrow else 372], top=10 + 18 * -(-_entries(data) // columns))
    if not len(data.lost) or data.tolerance is None:
        return nothing(figure, axes, "no completed baseline to compare with")
    left, right = _across(data.lost, data.tolerance)
    sound = ~np.array(data.suspect, dtype=bool)
    drift = data.drift[sound] if sound.any() else data.drift
    low, high = drift.min(), drift.max()
    log_scale(axes, "y", low / (high / low + 1) ** 0.1, high * (high / low + 1) ** 0.12)
    axes.set_xlim(left, right)
    limit = _limit(axes, data.tolerance, right, not narrow)
    _points(axes, data, left, right)
    _intervals(axes, data)
    labels = _labels(data, left, right, 1 if narrow else len(data.notes))
    spots = [*zip(np.clip(data.lost, left, right).tolist(), data.drift.tolist(), strict=True)]
    if data.pick is not None:
        spots += [(x, data.pick.drift) for x in np.linspace(data.pick.low, data.pick.high, 8).tolist()]
    place(axes, labels, spots, [limit.get_window_extent(renderer_of(axes))])
    axes.set_xlabel(
        "rerouting lost (held-out loss_reroute over baseline)" if not narrow else "rerouting lost against baseline"
    )
    axes.set_ylabel("benign drift (KL, nats per token)", labelpad=2)
    legend(axes, columns)
    return figure


def _entries(data: Evidence) -> int:
    """How many things the legend names at most."""
    lines = bool(data.others) + 1
    return len(set(data.phase)) + any(data.suspect) + lines


def _across(lost: Array, tolerance: float) -> tuple[float, float]:
    """The x-axis: from what was lost least, as far as one limit below 0, to three limits or to what was lost most."""
    low, high = float(lost.min()), float(lost.max())
    left = max(min(low, -0.1 * tolerance), -tolerance)
    return left - 0.08 * tolerance, min(max(high, 1.7 * tolerance), ZOOM * tolerance) + 0.12 * tolerance


def _limit(axes: Axes, tolerance: float, right: float, wide: bool) -> Annotation:
    axes.axvspan(tolerance, right, facecolor=BEYOND, alpha=0.07, zorder=0, linewidth=0)
    axes.axvline(tolerance, color=BEYOND, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    text = f"limit {number(tolerance, 2)}: not beyond" if wide else f"limit {number(tolerance, 2)}"
    return axes.annotate(
        text,
        (tolerance, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -3),
        textcoords="offset points",
        color=BEYOND,
        va="top",
        zorder=6,
    )


def _intervals(axes: Axes, data: Evidence) -> None:
    look: dict[str, Any] = {"color": MUTED, "alpha": 0.3, "linewidth": 2.5, "zorder": 1.5}
    for i, each in enumerate(data.others[:_MOST_BARS]):
        axes.plot((each.low, each.high), (each.drift, each.drift), label="_" if i else "model's 95 %", **look)
    best = sorted(
        (each for each in (*data.others, *([data.pick] if data.pick else [])) if each.pareto), key=lambda e: e.lost
    )
    if len(best) > 1:
        label = "best trade-off"
        axes.plot(
            [each.lost for each in best],
            [each.drift for each in best],
            color=MUTED,
            linewidth=1.1,
            linestyle=":",
            zorder=2,
            label=label,
        )
    if data.pick is not None:
        pick = data.pick
        axes.plot(
            (pick.low, pick.high), (pick.drift, pick.drift), color=ACCENT, linewidth=3, zorder=4, solid_capstyle="butt"
        )


def _points(axes: Axes, data: Evidence, left: float, right: float) -> None:
    """A mark a trial; off the scale an arrow at the edge; rings on the pick's seeds, crosses on what failed."""
    beyond, before = data.lost > right, data.lost < left
    for phase, mark in _MARKS.items():
        here = np.array([name == phase for name in data.phase])
        if not here.any():
            continue
        face = PAGE if phase in ("ablation", "confirm") else MUTED if phase == "baseline" else INK
        edge = MUTED if phase == "baseline" else INK
        shown = here & ~beyond & ~before
        at = data.lost[shown], data.drift[shown]
        axes.scatter(*at, s=36, marker=mark, facecolors=face, edgecolors=edge, label=phase, zorder=3)
    failed = np.array(data.suspect, dtype=bool)
    for outside, edge_x, mark in ((beyond & ~failed, right, ">"), (before & ~failed, left, "<")):
        if outside.any():
            x = np.full(outside.sum(), edge_x)
            axes.scatter(x, data.drift[outside], s=50, marker=mark, color=BEYOND, clip_on=False, zorder=5)
    if failed.any():
        at = np.clip(data.lost[failed], left, right), np.clip(data.drift[failed], *axes.get_ylim())
        look: dict[str, Any] = {
            "marker": "x",
            "color": BEYOND,
            "linewidths": 2,
            "clip_on": False,
            "label": "failed run",
        }
        axes.scatter(*at, s=70, zorder=5, **look)
    ringed = np.array(data.of_pick, dtype=bool) & ~beyond & ~before
    if ringed.any():
        at = data.lost[ringed], data.drift[ringed]
        axes.scatter(*at, s=130, zorder=5, facecolors="none", edgecolors=ACCENT, linewidths=2)


def _labels(data: Evidence, left: float, right: float, notes: int) -> list[Label]:
    labels = []
    if data.pick is not None:
        x = float(np.clip(data.pick.lost, left, right))
        labels.append(Label(f"pick: {data.pick.name}", x, data.pick.drift, ACCENT, bold=True))
    baseline = data.drift[np.array([name == "baseline" for name in data.phase], dtype=bool)]
    if len(baseline):
        labels.append(Label("without KL (baseline)", 0.0, float(np.max(baseline))))
    labels += [Label(note.text, float(np.clip(note.lost, left, right)), note.drift) for note in data.notes[:notes]]
    far = (data.lost > right) & ~np.array(data.suspect, dtype=bool)
    if far.any():
        most = number(float(data.lost[far].max()), 2)
        labels.append(Label(f"{far.sum()} further, up to {most}", right, float(data.drift[far].max()), BEYOND))
    return labels
