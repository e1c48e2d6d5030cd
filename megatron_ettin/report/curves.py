"""Curves of a run against tokens, drawn twice: as SVG for the page and by matplotlib for a PNG beside it.

The SVG is written here, in few lines, because the page has to take the reader's light or dark colours from its style
sheet and to stay small for a run of a million steps: each curve is thinned to what a screen can show (the extremes of
every bucket stay), with the line of its medians over it."""

from __future__ import annotations

import html
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.text import format_count

MOST_POINTS = 600  # of one curve on the page
LEAST_TO_SMOOTH, MOST_MEDIANS = 60, 150
MOST_DOTS = 40  # a segment of so few evaluations is drawn with a dot at each; of steps, one that stands alone
CLIP_QUANTILE, CLIP_ROOM, CLIP_FROM = 0.95, 1.25, 2.0
COLOURS = ("#2563c9", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285")  # the page has lighter ones for the dark
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a chart, a segment a phase: (x, y). `colour` indexes the palette, so that a run keeps its colour."""

    name: str
    colour: int
    segments: Sequence[tuple[Sequence[float], Sequence[float]]]
    dotted: bool = False  # whether its points are evaluations, far apart

    def has_dots(self, points: int) -> bool:
        """Whether each point of a segment is drawn: one alone has no line."""
        return points <= (MOST_DOTS if self.dotted else 1)


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[float, str]] = ()  # where phases start
    wide: bool = False
    clipped: bool = False  # whether a few high values may leave the plot, each with a mark at its top

    @property
    def values(self) -> list[float]:
        return sorted(value for curve in self.curves for _, y in curve.segments for value in y)

    @property
    def logarithmic(self) -> bool:
        """Whether values span so much that a linear axis would hide most of them."""
        values = self.values
        return not self.clipped and values[0] > 0 and values[-1] > 50 * values[len(values) // 2]

    @property
    def ceiling(self) -> float:
        """The highest value that is drawn in its place."""
        return clip_limit(self.values) if self.clipped else self.values[-1]

    @property
    def smoothed(self) -> bool:
        """Whether medians are drawn over the noise. A learning rate has none."""
        longest = max(len(x) for curve in self.curves for x, _ in curve.segments)
        return longest >= LEAST_TO_SMOOTH and self.unit != "lr"


def colour_places(objectives: Sequence[str]) -> list[int]:
    """A place in the palette for each model: the first encoder and the first decoder have theirs on every page, in
    whatever order the runs were named."""
    places, taken = [-1] * len(objectives), set[int]()
    for place, objective in enumerate(("mlm", "clm")):
        if objective in objectives:
            places[objectives.index(objective)] = place
            taken.add(place)
    free = (place for place in range(len(objectives) + 2) if place not in taken)
    return [next(free) if place < 0 else place for place in places]


def clip_limit(values: Sequence[float]) -> float:
    """Where an axis ends that a few of its ascending values would flatten; else the highest of them."""
    common = values[int((len(values) - 1) * CLIP_QUANTILE)]
    return common * CLIP_ROOM if 0 < common * CLIP_FROM < values[-1] else values[-1]


def plain(text: str) -> str:
    """Text that matplotlib draws as it is written: between two dollars it would read a formula."""
    return text.replace("$", r"\$")


def buckets(length: int, count: int) -> list[range]:
    return [range(bucket * length // count, (bucket + 1) * length // count) for bucket in range(count)]


def medians(x: Sequence[float], y: Sequence[float]) -> Points:
    """The middle of the curve without its noise: the median of each bucket, which neither lags nor follows spikes."""
    parts = buckets(len(x), max(1, min(MOST_MEDIANS, len(x) // 12)))
    return [(statistics.fmean(x[i] for i in part), statistics.median(y[i] for i in part)) for part in parts]


def smooth(x: Sequence[float], y: Sequence[float]) -> Points:
    """The curve without its noise, in at most MOST_POINTS points; one too short for that as it is."""
    if len(x) < LEAST_TO_SMOOTH:
        return list(zip(x, y))
    if len(x) > MOST_POINTS:
        return medians(x, y)
    half = max(1, len(y) // 40)
    return [(x[i], statistics.median(y[max(0, i - half) : i + half + 1])) for i in range(len(y))]


def thin(x: Sequence[float], y: Sequence[float]) -> Points:
    """At most MOST_POINTS points; the lowest and the highest of each bucket stay, so no spike is lost."""
    if len(x) <= MOST_POINTS:
        return list(zip(x, y))
    kept: Points = []
    for part in buckets(len(x), MOST_POINTS // 2):
        extremes = {min(part, key=y.__getitem__), max(part, key=y.__getitem__)}
        kept += [(x[index], y[index]) for index in sorted(extremes)]
    return kept


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [10.0**power for power in powers if low <= 10.0**power <= high]


def tick_text(value: float) -> str:
    if value and (abs(value) >= 10_000 or float(value).is_integer()):
        return format_count(value) if value > 0 else f"{value:g}"
    return f"{value:.3g}".replace("e-0", "e-")


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle inside the drawing, and its scales."""

    width: int
    height: int
    low: tuple[float, float]
    high: tuple[float, float]
    logarithmic: bool
    left: int = 62
    right: int = 14
    top: int = 24
    bottom: int = 42

    @classmethod
    def of(cls, chart: Chart) -> Frame:
        values = chart.values
        low, high = values[0], chart.ceiling
        if not chart.logarithmic:
            room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
            low, high = (0.0 if 0 <= low <= 2 * room else low - room), high + room
        width, height = (1000, 400) if chart.wide else (480, 290)
        last = max(x[-1] for curve in chart.curves for x, _ in curve.segments)
        return cls(width, height, (0.0, low), (last, high), chart.logarithmic)

    def x(self, value: float) -> float:
        return self.left + (value - self.low[0]) / (self.high[0] - self.low[0]) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.low[1], self.high[1]
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def path(self, segments: Iterable[Points]) -> str:
        high = self.high[1]
        return "".join(
            "M" + "L".join(f"{self.x(x):.1f} {self.y(min(y, high)):.1f}" for x, y in points) for points in segments
        )


def svg(chart: Chart) -> str:
    """The chart as an <svg> element; its colours and type come from the page's style sheet."""
    frame = Frame.of(chart)
    parts = [
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{html.escape(chart.title)}">',
        *_axes(frame, chart),
    ]
    for number, curve in enumerate(chart.curves):
        # Later curves are dashed in every chart, so that one that is covered exactly can still be seen through another.
        dash = ' stroke-dasharray="7 5"' if number else ""
        raw = frame.path(thin(x, y) for x, y in curve.segments)
        if chart.smoothed:
            parts.append(f'<path class="raw c{curve.colour}" d="{raw}"/>')
            middle = frame.path(smooth(x, y) for x, y in curve.segments)
            parts.append(f'<path class="line c{curve.colour}"{dash} d="{middle}"/>')
        else:
            parts.append(f'<path class="line c{curve.colour}"{dash} d="{raw}"/>')
        parts += _dots(frame, curve)
        parts += _above(frame, chart, curve)
    return "\n".join([*parts, "</svg>"])


def _dots(frame: Frame, curve: Curve) -> list[str]:
    return [
        f'<circle class="f{curve.colour}" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3"/>'
        for x, y in curve.segments
        if curve.has_dots(len(x))
        for a, b in zip(x, y)
    ]


def _above(frame: Frame, chart: Chart, curve: Curve) -> list[str]:
    """A mark at the top for each of the values that leave the plot, a few pixels apart at least."""
    high = {round(frame.x(a) / 4): (a, b) for x, y in curve.segments for a, b in zip(x, y) if b > chart.ceiling}
    return [
        f'<path class="f{curve.colour}" d="M{frame.x(a) - 4:.1f} {frame.top + 8}h8l-4 -7z">'
        f"<title>{tick_text(b)} at {tick_text(a)} tokens</title></path>"
        for a, b in high.values()
    ]


def _axes(frame: Frame, chart: Chart) -> list[str]:
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    low, high = frame.low[1], frame.high[1]
    parts = []
    for value in log_ticks(low, high) if frame.logarithmic else ticks(low, high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
    for value in ticks(0.0, frame.high[0], 8 if chart.wide else 5):
        x = frame.x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{tick_text(value)}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text x="{right}" y="{floor + 36}" text-anchor="end">tokens</text>')
    for start, phase in chart.marks if len(chart.marks) > 1 else ():
        x = frame.x(start)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{frame.top - 8}">{html.escape(phase)}</text>')
    return parts


def png(charts: Sequence[Chart]) -> bytes:
    """The same charts in one picture: the first over the whole width, the others in a row under it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    first, *others = charts
    figure = Figure(figsize=(13, 8.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, max(len(others), 1), height_ratios=(1.5, 1))
    places = [grid[0, :], *(grid[1, column] for column in range(len(others)))]
    for chart, place in zip(charts, places):
        axes = figure.add_subplot(place)
        _plot(axes, chart)
        for start, phase in chart.marks if len(chart.marks) > 1 else ():
            axes.axvline(start, color="0.6", linestyle=":", linewidth=1)
            if chart is first:
                axes.text(start, 1.01, plain(phase), transform=axes.get_xaxis_transform(), color="0.4")
        if chart.logarithmic:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
        axes.set(title=plain(chart.title), xlabel="tokens", xlim=(0, None))
        if chart.clipped:
            _clip(axes, chart)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def _clip(axes: Any, chart: Chart) -> None:
    frame = Frame.of(chart)
    axes.set_ylim(frame.low[1], frame.high[1])
    for curve in chart.curves:
        x = [a for segment, y in curve.segments for a, b in zip(segment, y) if b > chart.ceiling]
        mark_above(axes, x, frame.high[1], COLOURS[curve.colour % len(COLOURS)])


def mark_above(axes: Any, x: Sequence[float], top: float, colour: str) -> None:
    """Draw a triangle at the top of the plot for each value that leaves it."""
    (drawn,) = axes.plot(x, [top] * len(x), "^", color=colour, clip_on=False)
    drawn.set_in_layout(False)  # one without points has no extent, and the layout gives up


def _plot(axes: Any, chart: Chart) -> None:
    for number, curve in enumerate(chart.curves):
        colour, style = COLOURS[curve.colour % len(COLOURS)], "--" if number else "-"
        for index, (x, y) in enumerate(curve.segments):
            name, marker = plain(curve.name) if index == 0 else None, "o" if curve.has_dots(len(x)) else ""
            if chart.smoothed:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                x, y = zip(*smooth(x, y))
            axes.plot(x, y, style, marker=marker, markersize=3, color=colour, linewidth=1.8, label=name)
