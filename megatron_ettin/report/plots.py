"""Draw the charts of a report with matplotlib: each as a figure for papers, or several in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_ettin.base.plots import Curve, Panel, draw_figure, draw_overview
from megatron_ettin.report.compare import check_comparable
from megatron_ettin.report.series import charts, colour_indices, shown_keys
from megatron_ettin.runs.chain import PhaseChain

STYLES = ("-", "--", ":")
OVERVIEW = ("loss", "lr", "grad_norm", "speed")


def figures(models: Sequence[PhaseChain], form: str) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, content) of every chart that has numbers. `form`: png or svg."""
    for name, panel in panels(models):
        yield f"{name}.{form}", draw_figure(panel, form)


def overview(models: Sequence[PhaseChain]) -> bytes:
    """Return a PNG of losses, learning rate, gradient norm and speed."""
    drawn = dict(panels(models))
    return draw_overview([drawn[name] for name in OVERVIEW if name in drawn])


def overview_of_chain(chain: PhaseChain) -> bytes:
    """Return the overview of one model's phases as PNG. Raises UserError if a run has no metrics."""
    for run in chain.runs:
        check_comparable(run)
    return overview([chain])


def panels(models: Sequence[PhaseChain]) -> Iterator[tuple[str, Panel]]:
    """Yield (id, panel) of every chart that has numbers, against tokens, or against steps if tokens are unknown."""
    axes = [model.axes() for model in models]
    x_axis = "tokens" if all("tokens" in own for one in axes for own in one if len(own["steps"])) else "steps"
    colours = colour_indices([model.objective for model in models])
    longest = max(zip(models, axes), key=lambda pair: len(pair[0].runs))
    ends = [float(own[x_axis][-1]) for own in longest[1] if len(own["steps"])]
    marks = list(zip([0.0, *ends], longest[0].phases))[: len(ends)]
    for chart in charts(shown_keys(models)):
        curves = [
            curve
            for model, own, colour in zip(models, axes, colours, strict=True)
            for curve in _curves(
                model, [one.get(x_axis) for one in own], chart, colour, model is models[0], len(models) > 1
            )
        ]
        clipped, from_zero = "clip" in chart, "zero" in chart
        yield chart["id"], Panel(chart["title"], x_axis, curves, chart["unit"], marks, clipped, from_zero)


def _curves(
    model: PhaseChain, x: list[Any], chart: dict[str, Any], colour: int, is_first: bool, is_one_of_many: bool
) -> Iterator[Curve]:
    # several models, and the loss of one, are drawn in the models' colours; other charts colour each curve
    by_key = not is_one_of_many and chart["id"] != "loss"
    for number, key in enumerate(chart["keys"]):
        name = "training loss" if key == "loss" else key.replace("_", " ")
        if is_one_of_many:
            name = f"{model.name}, {name}" if len(chart["keys"]) > 1 else model.name
        segments = []
        for run, steps in zip(model.runs, x):
            column = run.metrics.columns.get(key, np.empty(0))
            known = np.flatnonzero(~np.isnan(column))
            if len(known):
                segments.append((steps[known], column[known] * chart["factor"]))
        if segments:
            yield Curve(
                name,
                number if by_key else colour,
                segments,
                "-" if by_key else STYLES[number % len(STYLES)],
                is_sparse=key.startswith("validation"),
                thin=key != "lr",
                smooth="smooth" in chart,
                # the first model's learning rate is drawn below the others', which often lie on it
                is_background=is_one_of_many and key == "lr" and is_first,
            )
