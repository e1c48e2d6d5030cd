"""The curves of a report as figures for papers, one file a chart, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_ettin.report.curves import COLOURS, tick_text
from megatron_ettin.report.models import Model
from megatron_ettin.report.series import charts, summary

LEAST_TO_SMOOTH, MOST_MEDIANS = 60, 300
STYLES = ("-", "--", ":")


def figures(models: Sequence[Model], form: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every chart that there are numbers for. `form`: png or svg."""
    keys = {key for model in models for run in model.runs for key in run.metrics.columns if len(run.metrics.known(key))}
    for chart in charts(keys):
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
    for colour, model in enumerate(models):
        _plot(axes, model, chart, axis, colour, len(models) > 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axes.set(title=chart["title"], xlabel=axis, ylabel=chart["unit"])
    if chart.get("zero"):
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9)
    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": chart["id"], "svg.fonttype": "none"}):
        drawn.savefig(written, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    return written.getvalue()


def _plot(axes: Any, model: Model, chart: dict[str, Any], axis: str, place: int, many: bool) -> None:
    for number, key in enumerate(chart["keys"]):
        colour = COLOURS[(place if many and len(chart["keys"]) < 3 else number) % len(COLOURS)]
        style = STYLES[(number if len(chart["keys"]) < 3 else place) % len(STYLES)]
        label = f"{model.name}, {key}" if many and len(chart["keys"]) > 1 else model.name if many else key
        for run, own in zip(model.runs, model.axes()):
            column = run.metrics.columns.get(key, np.full(len(own["steps"]), np.nan))
            known = np.flatnonzero(~np.isnan(column))
            if not len(known):
                continue
            x, y = own[axis][known], column[known] * chart["factor"]
            if len(x) >= LEAST_TO_SMOOTH and key != "lr":
                size = math.ceil(len(y) / MOST_MEDIANS)
                low, middle, high = summary(y, size)
                x, y = summary(x, size)[1], middle
                axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(x, y, style, marker="." if len(x) == 1 else "", color=colour, linewidth=1.6, label=label)
            label = "_"  # once in the legend
    ends = [float(own[axis][-1]) for own in model.axes() if len(own["steps"])]
    for end in ends[:-1] if place == 0 else []:
        axes.axvline(end, color="0.6", linestyle=":", linewidth=1)
