"""What all figures share: colours that follow the reader's theme, two widths, and the way to SVG and PNG."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from analysis.formatting import number

INK, MUTED, RULE, PAGE = "#1f2328", "#5f6670", "#d5d9de", "#ffffff"
ACCENT, BEYOND = "#0b5cb8", "#b3261e"
HEAT = ("#0b5cb8", "#8a5300", "#6b3fa0")
"""Of temperature bands, the coldest first; marks and dashes differ as well."""
IN_PAGE = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAGE: "var(--page)",
    ACCENT: "var(--accent)",
    BEYOND: "var(--beyond)",
    HEAT[1]: "var(--warm)",
    HEAT[2]: "var(--hot)",
}
"""What a colour of the file is within the page, where it follows the reader's light or dark."""

Width = Literal["wide", "narrow"]
WIDTHS: dict[Width, int] = {"wide": 600, "narrow": 350}
"""Pixels at which a figure is drawn, text in its true size: beside other text, and on a phone."""
TEXT = 12.5
"""Pixels of a figure's text."""
_STYLE = {
    "svg.hashsalt": "circuit-breaker-kl-sweep",
    "svg.fonttype": "none",
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Numbers:
    """A table of what a figure shows."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Drawn:
    """A figure as the report has it."""

    name: str
    title: str
    """What it shows, in a line."""
    description: str
    """For those who cannot see it: what is to be seen."""
    numbers: Numbers
    svg: dict[Width, str] = field(repr=False, default_factory=dict)
    png: bytes = field(repr=False, default=b"")

    @property
    def inline(self) -> Markup:
        """Both widths for the page, of which its style shows the one that fits."""
        return Markup("\n").join(self._element(width) for width in WIDTHS)

    def _element(self, width: Width) -> Markup:
        """The `<svg>` alone: ids that are unique within the page, a title, a description, the page's colours."""
        key = f"{self.name}-{width}"
        svg = self.svg[width]
        svg = svg[svg.index("<svg") :].replace('id="', f'id="{key}-').replace("url(#", f"url(#{key}-")
        svg = svg.replace('href="#', f'href="#{key}-')
        for colour, theme in IN_PAGE.items():
            svg = svg.replace(colour, theme)
        opening = svg.index(">") + 1
        # The size in points that Matplotlib writes would be a third more than the pixels that it was drawn for.
        tag = re.sub(r' (width|height)="[^"]*pt"', "", svg[:opening])
        tag = tag.replace("<svg ", f'<svg class="figure {width}" role="img" aria-labelledby="{key}-t {key}-d" ', 1)
        labels = f'<title id="{key}-t">{escape(self.title)}</title><desc id="{key}-d">{escape(self.description)}</desc>'
        return Markup(tag + labels + svg[opening:])


def style() -> Any:
    """The context in which a figure is drawn."""
    return matplotlib.rc_context(_STYLE)


def panels(
    width: Width,
    heights: Sequence[int],
    *,
    columns: int = 1,
    left: int = 62,
    right: int = 14,
    top: int = 24,
    gap: int = 34,
) -> tuple[Figure, list[Axes]]:
    """A figure with a row of panels for each of `heights` (pixels), margins in pixels.

    Margins are set and not found: a layout engine takes longer than all the drawing.
    """
    bottom = 44
    across = WIDTHS[width]
    down = sum(heights) + gap * (len(heights) - 1) + top + bottom
    figure = Figure(figsize=(across / 72, down / 72), facecolor=PAGE)
    FigureCanvasAgg(figure)
    made, y = [], float(top)
    inner = (across - left - right - (columns - 1) * left) / columns
    for height in heights:
        for column in range(columns):
            x = left + column * (inner + left)
            made.append(figure.add_axes((x / across, 1 - (y + height) / down, inner / across, height / down)))
        y += height + gap
    for axes in made:
        axes.set_facecolor(PAGE)
    return figure, made


def renderer_of(axes: Axes) -> RendererBase:
    """What measures text, in pixels."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer: RendererBase = canvas.get_renderer()
    return renderer


def log_scale(axes: Axes, axis: Literal["x", "y"], low: float, high: float) -> None:
    """A logarithmic axis whose labels are plain numbers."""
    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
    of = getattr(axes, f"{axis}axis")
    of.set_minor_locator(NullLocator())  # they are most of what drawing costs
    if high < 4 * low:
        of.set_major_locator(MaxNLocator(4))
    else:
        of.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,)))
    of.set_major_formatter(lambda value, _: number(value))


def say(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float] = (0, 0), **style: Any) -> Any:
    """Text at a point, moved by `offset` pixels."""
    return axes.annotate(text, at, xytext=offset, textcoords="offset points", **{"zorder": 6, **style})


def legend(axes: Axes, columns: int, **more: Any) -> None:
    """The legend above the panel, beginning at its left end."""
    spacing = {"handletextpad": 0.35, "columnspacing": 1.1, "handlelength": 1.2, "borderaxespad": 0.2}
    axes.legend(**{"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": columns, **spacing, **more})


def nothing(figure: Figure, axes: Axes, why: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    for each in figure.axes:
        each.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=axes.transAxes, wrap=True)
    return figure


def svg_of(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()
