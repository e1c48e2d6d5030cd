"""Draw curves, bars and heat maps as PNG, SVG or PDF files with matplotlib.

matplotlib is imported inside the functions, because it takes a second.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.text import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

COLOURS = ("#2563c9", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285")
DPI, PAPER_DPI = 110, 200
LEAST_TO_SMOOTH, MOST_MEDIANS = 60, 300
# a segment of at most this many sparse points has a dot at each
MOST_DOTS = 40
# an axis is logarithmic if the highest value is more than this many times the median
WIDE_RANGE = 50
CLIP_QUANTILE, CLIP_ROOM, CLIP_FROM = 0.95, 1.25, 2.0
# the names of a heat map's columns are horizontal if they have at most this many characters in all
MOST_HORIZONTAL = 60


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    colour: int
    """Index in the palette, so that a run keeps its colour in every panel."""
    segments: Sequence[tuple[Values, Values]]
    """x and y of each phase, without NaN."""
    style: str = "-"
    is_sparse: bool = False
    """True if its points are far apart, such as evaluations, and are drawn as dots."""
    thin: bool = False
    """True if many points are drawn as medians, with a band from the lowest to the highest value."""
    smooth: bool = False
    """True if the medians of a thin curve are smoothed over a twentieth of it, with pale unsmoothed values behind."""
    is_background: bool = False
    """True if other curves may lie on it, so that it is drawn wide and pale."""


@dataclass(frozen=True)
class Panel:
    """One plot with its axes."""

    title: str
    x_label: str
    curves: Sequence[Curve]
    y_label: str = ""
    marks: Sequence[tuple[float, str]] = ()
    """x and name of vertical lines, such as the starts of phases. No line is drawn at the first."""
    clipped: bool = False
    """True if a few high values may leave the plot, each with a mark at its top."""
    from_zero: bool = False
    percent: bool = False
    log_base: int | None = None
    """Base of a logarithmic x axis."""
    x_ticks: Sequence[int] = ()

    @property
    def values(self) -> Values:
        """Return all y values in ascending order."""
        return np.sort(np.concatenate([np.asarray(y, float) for curve in self.curves for _, y in curve.segments]))

    @property
    def is_logarithmic(self) -> bool:
        """Return whether values span so much that a linear axis would hide most of them."""
        values = self.values
        return not (self.clipped or self.from_zero) and bool(
            values[0] > 0 and values[-1] > WIDE_RANGE * values[len(values) // 2]
        )


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel with at least one value on matplotlib axes."""
    for curve in panel.curves:
        _draw_curve(axes, curve)
    for x, _ in panel.marks[1:]:
        axes.axvline(x, color="0.6", linestyle=":", linewidth=1)
    axes.set(title=escape_formulas(panel.title), xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log_base:
        axes.set_xscale("log", base=panel.log_base)
    if panel.x_ticks:
        axes.set_xticks(panel.x_ticks, [f"{x:,}" for x in panel.x_ticks])
    elif not panel.log_base:
        axes.xaxis.set_major_formatter(lambda value, _: format_tick(value))
    if panel.is_logarithmic:
        axes.set_yscale("log")
    elif panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif panel.values[-1] >= 10_000:
        axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.clipped:
        _clip(axes, panel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    colour = COLOURS[curve.colour % len(COLOURS)]
    label = escape_formulas(curve.label)
    for x, y in curve.segments:
        marker = "o" if len(x) <= (MOST_DOTS if curve.is_sparse else 1) else ""
        if curve.thin and len(x) >= LEAST_TO_SMOOTH:
            size = math.ceil(len(y) / MOST_MEDIANS)
            if size == 1 and curve.smooth:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            low, y, high = bucket_summary(y, size)
            x = bucket_summary(x, size)[1]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            y = running_median(y) if curve.smooth else y
        width, alpha = (4.0, 0.5) if curve.is_background else (1.6, 1.0)
        axes.plot(
            x, y, curve.style, marker=marker, markersize=3, color=colour, label=label, linewidth=width, alpha=alpha
        )
        # the legend names a curve once, and leaves out labels that begin with _
        label = "_"


def _clip(axes: Axes, panel: Panel) -> None:
    """End the axis below the few values that would flatten it, with a mark at its top for each."""
    values = panel.values
    top = clip_limit(values)
    if top >= values[-1]:
        return
    axes.set_ylim(max(0.0, float(values[0]) - 0.05 * top), top)
    for curve in panel.curves:
        above = [x[y > top] for x, y in curve.segments if (y > top).any()]
        if above:
            x = np.concatenate(above)
            axes.plot(x, np.full(len(x), top), "^", color=COLOURS[curve.colour % len(COLOURS)], clip_on=False)


def draw_figure(panel: Panel, form: str) -> bytes:
    """Return the content of an image file of one panel, for papers. `form` is png, svg or pdf."""
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    draw_panel(axes, panel)
    _add_legend(axes)
    return encode(figure, form, PAPER_DPI, panel.title)


def draw_row(panels: Sequence[Panel], width: float = 13, height: float = 5.5) -> bytes:
    """Return a PNG of panels next to each other; `width` and `height` of all are in inches."""
    figure = new_figure(width, height)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw_panel(axes, panel)
        _add_legend(axes)
    return encode(figure)


def draw_overview(panels: Sequence[Panel]) -> bytes:
    """Return a PNG with the first panel over the whole width and the others in a row below it."""
    first, *others = panels
    figure = new_figure(13, 8.5)
    grid = figure.add_gridspec(2, max(len(others), 1), height_ratios=(1.5, 1))
    axes = figure.add_subplot(grid[0, :])
    draw_panel(axes, first)
    for x, name in first.marks if len(first.marks) > 1 else ():
        axes.text(x, 1.01, escape_formulas(name), transform=axes.get_xaxis_transform(), color="0.4")
    axes.legend(frameon=False)
    for column, panel in enumerate(others):
        draw_panel(figure.add_subplot(grid[1, column]), panel)
    return encode(figure)


def _add_legend(axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)


def draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], spread: Any, notes: Sequence[str]) -> None:
    """Draw horizontal bars, with error bars of the lengths `spread` (matplotlib's `xerr`) and a note at each end."""
    bars = axes.barh(range(len(names)), values, xerr=spread, color="#4c78a8", ecolor="#555555", capsize=3)
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_heat_map(axes: Axes, rows: Sequence[str], columns: Sequence[str], grid: Values) -> None:
    """Draw shares as colours and percents. `grid` is [rows, columns], NaN where there is no value."""
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    if sum(map(len, columns)) > MOST_HORIZONTAL:
        axes.tick_params(axis="x", rotation=90)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        is_known = not math.isnan(value)
        text, colour = (f"{value:.1%}" if is_known else "-"), ("white" if is_known and value <= middle else "black")
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def encode(figure: Figure, form: str = "png", dpi: int = DPI, salt: str = "") -> bytes:
    """Return the content of an image file of a figure. The same figure gives the same bytes.

    Args:
        figure: the figure.
        form: png, svg or pdf.
        dpi: pixels per inch of a PNG.
        salt: seed of the ids in an SVG.
    """
    import matplotlib

    written = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(written, format=form, dpi=dpi, metadata=metadata)
    return written.getvalue()


def bucket_summary(values: Values, size: int) -> tuple[Values, Values, Values]:
    """Return lowest, median and highest of each group of `size` consecutive values; NaN if all of them are NaN."""
    filled = np.full(math.ceil(len(values) / size) * size, np.nan)
    filled[: len(values)] = values
    rows = filled.reshape(-1, size)
    with warnings.catch_warnings():
        # numpy warns of rows without a number
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmin(rows, axis=1), np.nanmedian(rows, axis=1), np.nanmax(rows, axis=1)


def running_median(values: Values) -> Values:
    """Return the centred median over a twentieth of the values, which neither lags nor follows spikes."""
    half = max(1, len(values) // 40)
    padded = np.pad(values, half, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1))


def clip_limit(values: Sequence[float] | Values) -> float:
    """Return the end of an axis for ascending values: below the highest if a few values would flatten the rest."""
    common = float(values[int((len(values) - 1) * CLIP_QUANTILE)])
    return common * CLIP_ROOM if 0 < common * CLIP_FROM < values[-1] else float(values[-1])


def format_tick(value: float) -> str:
    """Format a value on an axis with three digits: 1.7T, 512, 0.25, 1e-5."""
    if value and (abs(value) >= 10_000 or float(value).is_integer()):
        return format_count(value) if value > 0 else f"{value:g}"
    return f"{value:.3g}".replace("e-0", "e-")


def escape_formulas(text: str) -> str:
    """Return text that matplotlib draws as it is written: text between two dollars would be a formula."""
    return text.replace("$", r"\$")
