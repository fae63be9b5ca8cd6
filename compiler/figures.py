"""The report's figures: evidence -> SVG text to inline in a page.

Text stays text, so that it can be searched and read aloud; the ids of a figure carry its name, so that several
figures share a page; the same evidence gives the same bytes. Titles and keys are the page's, in HTML: they wrap.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from .evidence import Judged, Point
from .judged import Curves

BLUE, GREEN, ORANGE, GREY, SHADE = "#0072b2", "#009e73", "#d55e00", "#767676", "#e4f1e8"
TIMES = ((ORANGE, (4, 2)), (GREEN, (5, 1.5, 1.5, 1.5)), (GREY, (1.5, 1.5)))  # of the batch sizes: colour, dashes
PANEL, WIDE = (3.5, 2.7), (4.6, 3.1)  # inches
ENOUGH = 10  # rows that must leave before a share of them is drawn
_LONG = re.compile(r"(\d\.\d\d)\d{3,}")  # coordinates, in points; no label has so many digits
_FULL = (0.05, 0.2, 0.5)  # of all rows in a bin: the sizes of its dot
_TICKS = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
_STYLE: Any = {  # the stub's type lists every one of matplotlib's settings
    "svg.fonttype": "none", "svg.hashsalt": "offramp", "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"], "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.edgecolor": GREY, "lines.linewidth": 1.6,
}  # fmt: skip


def svg(name: str, says: str, draw: Callable[[Axes], None], size: tuple[float, float] = PANEL) -> str:
    """An inline SVG element; `name` makes its ids its own, `says` is read to those who cannot see it."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"\n\s*", "\n", _LONG.sub(r"\1", text))  # half the size, and no difference to be seen
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{says}" id="{name}" ', 1)


def thresholds_figure(name: str, judged: Judged, rows: int, threshold: float | None) -> str:
    """Exit rate, agreement and accuracy against the threshold; the plan's own threshold is marked."""

    def draw(axes: Axes) -> None:
        seen = judged.curves
        few = seen.exit_rate * rows < ENOUGH
        axes.plot(seen.thresholds, seen.exit_rate, color=GREY, ls="--")
        axes.plot(seen.thresholds, np.where(few, np.nan, seen.agreement), color=BLUE)
        if seen.accuracy is not None:
            axes.plot(seen.thresholds, np.where(few, np.nan, seen.accuracy), color=ORANGE, ls="-.")
        _confidence_axis(axes, seen)
        axes.set(xlabel="threshold", ylabel="share of rows", ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        if threshold is not None:
            axes.axvline(np.clip(threshold, seen.thresholds[0], seen.thresholds[-1]), color="black", lw=1, ls=":")

    return svg(name, f"Exit rate and agreement against threshold at {_plain(judged.place)}", draw)


def reliability_figure(name: str, judged: Judged) -> str:
    """Agreement against confidence before and after the temperature; dots are as large as their bin is full."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        for seen, colour, face in ((judged.before, ORANGE, "none"), (judged.after, BLUE, BLUE)):
            axes.plot(seen.confidence, seen.agreement, color=colour, lw=1, alpha=0.7)
            sizes = np.digitize(seen.share, _FULL)
            for size in np.unique(sizes):
                x, y = seen.confidence[sizes == size], seen.agreement[sizes == size]
                axes.plot(x, y, "o", ms=3.5 + 2.5 * size, mfc=face, mec=colour, alpha=0.8, clip_on=False, zorder=3)
        axes.set(xlabel="confidence", ylabel="agreement", xlim=(0, 1), ylim=(0, 1.03))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, 0, " %"))

    return svg(name, f"Agreement against confidence at {_plain(judged.place)}", draw)


def effect_figure(name: str, judged: Judged, threshold: float | None) -> str:
    """The change of accuracy as labels show it (Eq. 2) and the most it may lose without them (Eq. 3)."""

    def draw(axes: Axes) -> None:
        seen = judged.curves
        axes.plot(seen.exit_rate, -seen.bound * 100, color=BLUE)
        if seen.effect is not None:
            axes.plot(seen.exit_rate, seen.effect * 100, color=ORANGE, ls="-.")
        axes.axhline(0, color=GREY, lw=1)
        axes.set(xlabel="rows that leave", ylabel="accuracy, points", xlim=(0, 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
        if threshold is not None:
            at = float(np.interp(threshold, seen.thresholds, seen.exit_rate))
            axes.axvline(at, color="black", lw=1, ls=":")

    return svg(name, f"True effect on accuracy and its bound at {_plain(judged.place)}", draw)


def savings_figure(name: str, points: Sequence[Point]) -> str:
    """Saved compute and time against tolerance, a step for every plan of the dial; certified steps are shaded."""

    def draw(axes: Axes) -> None:
        _steps(axes, points, [p.saved for p in points], BLUE, "-", "o")
        for index in range(min(len(points[0].saved_time), len(TIMES))):
            colour, dash = TIMES[index]
            _steps(axes, points, [p.saved_time[index] for p in points], colour, (0, dash), "s")
        _tolerance_axis(axes, points)
        axes.axhline(0, color=GREY, lw=1)
        axes.set(ylabel="saved on the test rows")

    return svg(name, "Saved compute and time against tolerance", draw, WIDE)


def risks_figure(name: str, points: Sequence[Point]) -> str:
    """Disagreement, regret and the true drop against tolerance; the dotted line is the tolerance itself."""

    def draw(axes: Axes) -> None:
        _steps(axes, points, [p.disagreement for p in points], BLUE, "-", "o")
        _steps(axes, points, [p.regret for p in points], GREEN, "--", "^")
        drops = [p.drop for p in points if p.drop is not None]
        if drops:
            _steps(axes, points, drops, ORANGE, "-.", "s")
        _tolerance_axis(axes, points)
        end = axes.get_xlim()[1]
        axes.plot([0, end], [0, end], color=GREY, lw=1, ls=":")
        axes.axhline(0, color=GREY, lw=1)
        axes.set(ylabel="on the test rows")

    return svg(name, "Disagreement, regret and accuracy drop against tolerance", draw, WIDE)


def _steps(axes: Axes, points: Sequence[Point], values: Sequence[float], colour: str, style: Any, marker: str) -> None:
    """A plan holds from its tolerance up to the next one's."""
    tolerances = [p.plan.tolerance for p in points]
    axes.step([*tolerances, _end(points)], [*values, values[-1]], where="post", color=colour, ls=style, lw=1.3)
    axes.plot(tolerances, values, marker=marker, ms=4.5, color=colour, ls="none")


def _tolerance_axis(axes: Axes, points: Sequence[Point]) -> None:
    tolerances = [*(p.plan.tolerance for p in points), _end(points)]
    for index, point in enumerate(points):
        if point.plan.certificate is not None:
            axes.axvspan(tolerances[index], tolerances[index + 1], color=SHADE, lw=0, zorder=0)
    axes.set(xlabel="tolerance", xlim=(0, _end(points)))
    axes.xaxis.set_major_formatter(PercentFormatter(1, None, " %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, None, " %"))


def _end(points: Sequence[Point]) -> float:
    """Where the tolerance axis ends: beyond the last plan, so that its step can be seen."""
    return max(points[-1].plan.tolerance * 1.12, 1e-3)


def _confidence_axis(axes: Axes, seen: Curves) -> None:
    """0.9, 0.99 and 0.999 at equal distances."""
    low, high = float(seen.thresholds[0]), float(seen.thresholds[-1])
    axes.set_xscale("logit")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([t for t in _TICKS if low <= t <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _plain(text: str) -> str:
    """Without what means something in an attribute."""
    return re.sub(r"[^\w .,:/()\[\]-]", "?", text)
