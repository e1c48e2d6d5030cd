"""The curves of a report as figures for papers, one file a chart, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_ettin.report.curves import COLOURS, MOST_DOTS, clip_limit, colour_places, mark_above, plain, tick_text
from megatron_ettin.report.models import Model
from megatron_ettin.report.record import Column
from megatron_ettin.report.series import charts, shown_keys, summary

LEAST_TO_SMOOTH, MOST_MEDIANS = 60, 300
STYLES = ("-", "--", ":")


def figures(models: Sequence[Model], form: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every chart that there are numbers for. `form`: png or svg."""
    for chart in charts(shown_keys(models)):
        yield f"{chart['id']}.{form}", figure(models, chart, form)


def figure(models: Sequence[Model], chart: dict[str, Any], form: str) -> bytes:
    """One chart against tokens (steps where they are not known), phases parted by dotted lines."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    drawn = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = drawn.add_subplot()
    known = [axis for model in models for axis in model.axes()]
    axis = "tokens" if all("tokens" in one for one in known if len(one["steps"])) else "steps"
    places = colour_places([model.runs[0].named("objective") for model in models])
    for model, colour in zip(models, places, strict=True):
        _plot(axes, model, chart, axis, colour, len(models) > 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axes.set(title=plain(chart["title"]), xlabel=axis, ylabel=chart["unit"])
    if chart.get("zero"):
        axes.set_ylim(bottom=0)
    if chart.get("clip"):
        _clip(axes, models, places, chart, axis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9)
    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": chart["id"], "svg.fonttype": "none"}):
        drawn.savefig(written, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    return written.getvalue()


def said(key: str) -> str:
    """A key of metrics.jsonl in words."""
    return "training loss" if key == "loss" else key.replace("_", " ")


def smooth(values: Column) -> Column:
    """Running median over a twentieth of the values, centred, which neither lags nor follows spikes."""
    half = max(1, len(values) // 40)
    padded = np.pad(values, half, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _clip(axes: Any, models: Sequence[Model], places: Sequence[int], chart: dict[str, Any], axis: str) -> None:
    """End the axis below the few values that would flatten it, with a mark at its top for each."""
    (key,) = chart["keys"]
    columns = [run.metrics.known(key) for model in models for run in model.runs]
    values = np.sort(np.concatenate(columns)) * chart["factor"]
    top = clip_limit(values)
    if top >= values[-1]:
        return
    axes.set_ylim(max(0.0, float(values[0]) - 0.05 * top), top)
    for place, model in zip(places, models, strict=True):
        for run, own in zip(model.runs, model.axes()):
            high = np.flatnonzero(run.metrics.columns.get(key, np.empty(0)) * chart["factor"] > top)
            mark_above(axes, own[axis][high].tolist(), top, COLOURS[place % len(COLOURS)])


def _plot(axes: Any, model: Model, chart: dict[str, Any], axis: str, place: int, many: bool) -> None:
    for number, key in enumerate(chart["keys"]):
        # one colour a model in every chart; a page of one model has it for the parts of a chart
        by_key = not many and chart["id"] != "loss"
        colour = COLOURS[(number if by_key else place) % len(COLOURS)]
        style = "-" if by_key else STYLES[number % len(STYLES)]
        several = len(chart["keys"]) > 1
        label = f"{model.name}, {said(key)}" if many and several else model.name if many else said(key)
        for run, own in zip(model.runs, model.axes()):
            column = run.metrics.columns.get(key, np.full(len(own["steps"]), np.nan))
            known = np.flatnonzero(~np.isnan(column))
            if not len(known):
                continue
            x, y = own[axis][known], column[known] * chart["factor"]
            if len(x) >= LEAST_TO_SMOOTH and key != "lr":
                size = math.ceil(len(y) / MOST_MEDIANS)
                if size == 1 and chart.get("smooth"):
                    axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                low, middle, high = summary(y, size)
                x, y = summary(x, size)[1], middle
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                y = smooth(y) if chart.get("smooth") else y
            marker = "o" if len(x) <= (MOST_DOTS if key.startswith("validation") else 1) else ""
            # the others' learning rates lie on the first one
            wide = {"linewidth": 4.0, "alpha": 0.5} if many and key == "lr" and place == 0 else {"linewidth": 1.6}
            axes.plot(x, y, style, marker=marker, markersize=3, color=colour, label=plain(label), **wide)
            label = "_"  # once in the legend
    ends = [float(own[axis][-1]) for own in model.axes() if len(own["steps"])]
    for end in ends[:-1] if place == 0 else []:
        axes.axvline(end, color="0.6", linestyle=":", linewidth=1)
