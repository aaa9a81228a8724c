"""Draws the pictures of tools/run_report.py as SVG text that stands inside an HTML page; needs matplotlib.

Text stays text, in the page's own font; colours are Okabe and Ito's, which colour-blind readers can tell apart, and
nothing is told by colour alone. Axes begin where the data are, except those of bars, whose length is their meaning.
"""

from __future__ import annotations

import contextlib
import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours but for yellow, which is faint on white, and black, which shows means.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))  # of the first six lines, of the next six, …
BLACK, GREY = "#000000", "#5a5a5a"
WIDTH_IN = 5.0  # drawn so narrow, and with letters so large, that a phone shows it whole and readable
LEGEND_LETTERS = 68  # that fit beside each other at that width
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.xmargin": 0.02, "axes.ymargin": 0.06,
    "legend.frameon": False, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.formatter.use_mathtext": False, "axes.formatter.useoffset": False,
}  # fmt: skip


@dataclass
class Line:
    """One line of a chart: points of equal count; `spread` is half the height of a band around it."""

    label: str  # "" for none in the legend
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashes: Any = "solid"  # "none": markers alone
    marker: str = ""
    width: float = 1.5
    alpha: float = 1.0
    filled: bool = True
    spread: Sequence[float] = ()


@dataclass
class Chart:
    """What the axes say; `events`: (x, text) of upright lines."""

    xlabel: str
    ylabel: str
    height_in: float = 3.0
    events: Sequence[tuple[float, str]] = field(default_factory=list)


def style_of(index: int) -> tuple[str, Any]:
    """Colour and dashes of the line number `index`, counted from 0; they repeat after 24."""
    return PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in this page's style, whatever the user's matplotlibrc says."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


@styled()
def draw_lines(lines: Sequence[Line], chart: Chart, alt: str) -> str:
    """A line chart as SVG with `alt` for those who do not see it."""
    figure, axes = _begin(chart)
    for line in lines:
        axes.plot(
            line.x, line.y, color=line.color, linestyle=line.dashes, linewidth=line.width, alpha=line.alpha,
            marker=line.marker, markersize=5, markerfacecolor=line.color if line.filled else "white",
            label=line.label or "_",
        )  # fmt: skip
        if len(line.spread):
            low, high = ([y + sign * s for y, s in zip(line.y, line.spread)] for sign in (-1, 1))
            axes.fill_between(line.x, low, high, color=line.color, alpha=0.18, linewidth=0)
    for x, text in chart.events:
        axes.axvline(x, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.text(
            x, 0.99, f" {text}", rotation=90, transform=axes.get_xaxis_transform(), fontsize=8, color=GREY,
            ha="right", va="top",
        )  # fmt: skip
    _legend(figure, axes)
    return _finish(figure, alt)


@styled()
def draw_dots(names: Sequence[str], lines: Sequence[Line], chart: Chart, alt: str) -> str:
    """Named rows from the top, with a dot for every point; a line's y are rows, its spread goes along x."""
    figure, axes = _begin(chart)
    for line in lines:
        bars = {"xerr": list(line.spread), "capsize": 4} if len(line.spread) else {}
        axes.errorbar(
            line.x, line.y, color=line.color, linestyle="none", marker=line.marker or "o", markersize=6,
            label=line.label or "_", markerfacecolor=line.color if line.filled else "white", **bars,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    _legend(figure, axes)
    return _finish(figure, alt)


@styled()
def draw_bars(names: Sequence[str], values: Sequence[float], kinds: Sequence[str], chart: Chart, alt: str) -> str:
    """Horizontal bars from the top; bars of one kind share a colour, which the legend names."""
    figure, axes = _begin(chart)
    for index, kind in enumerate(dict.fromkeys(kinds)):
        rows = [row for row, each in enumerate(kinds) if each == kind]
        axes.barh(rows, [values[row] for row in rows], color=PALETTE[index % len(PALETTE)], label=kind)
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelrotation=20)
    _legend(figure, axes)
    return _finish(figure, alt)


def _begin(chart: Chart) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, chart.height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(chart.xlabel)
    axes.set_ylabel(chart.ylabel)
    return figure, axes


def _legend(figure: Figure, axes: Any) -> None:
    """Above the axes, where it hides no data, in as many columns as fit; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = next(n for n in range(len(labels), 0, -1) if n == 1 or _width(labels, n) <= LEGEND_LETTERS)
        figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2, columnspacing=1.2)


def _width(labels: Sequence[str], columns: int) -> int:
    """Letters side by side when labels fill that many columns, one column after the other; 7 for each line shown."""
    fewer, more = divmod(len(labels), columns)
    ends = list(itertools.accumulate([fewer + 1] * more + [fewer] * (columns - more)))
    return sum(max(map(len, labels[start:end])) + 7 for start, end in zip([0, *ends], ends))


def _finish(figure: Figure, alt: str) -> str:
    """The figure as an <svg> element that scales with its column; what only a file of its own needs is left out."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": alt}), warnings.catch_warnings():  # no id twice in a page
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font has to have it, not matplotlib's
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    box = re.search(r'viewBox="([\d. ]+)"', text)
    assert box, "matplotlib wrote no viewBox"
    body = text[text.index(">", box.end()) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every figure
    body = re.sub(r" font-family: [^;\"]*;?", "", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(alt)}">{body}</svg>'
