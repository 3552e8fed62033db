"""Labels beside the data: each is set where it covers nothing, and joined to its point by a thin line."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from analysis.report.figures.style import INK, MUTED, PAGE, renderer_of
from analysis.surrogate.kernel import Array

_RADII = (26.0, 40.0, 58.0, 80.0, 106.0, 136.0, 170.0)
_DIRECTIONS = 20
_MARK = 7.0
"""Pixels around a point that a label leaves free."""


@dataclass(frozen=True)
class Label:
    """Text that belongs to a point of the data."""

    text: str
    x: float
    y: float
    colour: str = INK
    bold: bool = False


def place(axes: Axes, labels: Sequence[Label], points: Iterable[tuple[float, float]], taken: Iterable[Bbox]) -> None:
    """Draw the labels within `axes`, each as near to its point as it can be without covering anything.

    Args:
        labels: the more important first.
        points: the data that no label may cover.
        taken: boxes in pixels that are covered already.
    """
    renderer = renderer_of(axes)
    inside = np.array(axes.get_window_extent(renderer).extents)
    pixels = axes.transData.transform(np.array([*points, *((each.x, each.y) for each in labels)]).reshape(-1, 2))
    covered = np.concatenate([np.hstack([pixels - _MARK, pixels + _MARK]), *([box.extents] for box in taken)])
    scale = axes.figure.dpi / 72
    for label in labels:
        anchor = axes.transData.transform((label.x, label.y))
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            color=label.colour,
            fontweight="bold" if label.bold else "normal",
            linespacing=1.25,
            zorder=8,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": PAGE, "edgecolor": "none", "alpha": 0.9},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 6 * scale},
        )
        size = text.get_window_extent(renderer)
        box = _free(anchor, np.array([size.width + 6, size.height + 4]), inside, covered)
        text.set_position(tuple((((box[:2] + box[2:]) / 2 - anchor) / scale).tolist()))
        covered = np.vstack([covered, box])


def _free(anchor: Array, size: Array, inside: Array, covered: Array) -> Array:
    """The nearest box around the anchor that covers nothing, or the one that covers least; boxes are x0, y0, x1, y1."""
    best, least = np.empty(4), math.inf
    for radius in _RADII:
        for angle in 2 * math.pi * (np.arange(_DIRECTIONS) + 0.5) / _DIRECTIONS:
            towards = np.array([math.cos(angle), math.sin(angle)])
            middle = anchor + towards * [radius, radius / 2] + towards * size / 2
            box = np.concatenate([middle - size / 2, middle + size / 2])
            outside = size.prod() - _shared(box, inside[None]).sum()
            cost = 20 * outside + _shared(box, covered).sum()
            if cost < least - 1e-6:
                best, least = box, cost
        if least < 1e-6:
            break
    return best


def _shared(box: Array, others: Array) -> Array:
    """The areas that a box has in common with each of `others` `[n, 4]`."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return np.asarray(sides.clip(min=0).prod(axis=1))
