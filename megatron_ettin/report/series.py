"""Pack the numbers of a page, small enough to mail and fine enough to zoom in.

A long curve is stored twice. The page draws the overview first: at most 600 buckets with lowest, median and highest
value. The detail (base64 of 32-bit floats) has every step if the models of a page have at most 120,000 steps together.
Otherwise it has 40,000 buckets in all with the same three values, so that a page stays under 10 MB.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_ettin.base.plots import bucket_summary
from megatron_ettin.base.text import masked
from megatron_ettin.metrics.columns import Column
from megatron_ettin.runs.chain import PhaseChain
from megatron_ettin.runs.directory import RunDirectory

OVERVIEW_BUCKETS = 600
# limits over all models of a page: steps that are stored one by one, and buckets beyond that
MOST_STEPS, DETAIL_BUCKETS = 120_000, 40_000
# share of steps with a value; a curve with a smaller share is drawn across the other steps, else these are gaps
DENSE = 0.9
# largest number of restarts, and of bad steps, that are marked for one run
MOST_MARKS = 1_000
AXES = ("tokens", "steps", "hours")
# id, keys of metrics.jsonl (a * at the end matches any text), title, unit, factor of the values, flags:
# "smooth" adds a running median, "zero" starts the axis at 0 so that noise does not fill the chart, "clip" cuts off a
# few high values, with a mark, if they would flatten the rest
CHARTS: tuple[tuple[str, tuple[str, ...], str, str, float, tuple[str, ...]], ...] = (
    ("loss", ("loss", "validation_loss"), "Loss", "nats a token", 1.0, ("smooth",)),
    ("sources", ("validation_loss_*", "validation_loss/*"), "Validation loss by source", "nats a token", 1.0, ()),
    ("parts", ("loss_*",), "Training loss by objective", "nats a token", 1.0, ("smooth",)),
    ("accuracy", ("validation_accuracy*",), "Validation accuracy", "%", 100.0, ()),
    ("lr", ("lr",), "Learning rate", "", 1.0, ()),
    ("grad_norm", ("grad_norm",), "Gradient norm", "", 1.0, ("clip", "smooth")),
    ("speed", ("tokens_per_second",), "Tokens per second", "tokens/s", 1.0, ("zero", "smooth")),
    ("mfu", ("mfu",), "Model FLOP utilisation", "%", 100.0, ("zero", "smooth")),
    ("memory", ("peak_memory_bytes",), "Peak memory of a rank", "GiB", 2.0**-30, ("zero",)),
    ("slowest", ("slowest_ratio",), "Slowest rank", "times the others' seconds", 1.0, ()),
)
# a chart of the slowest rank whose ratio stays below this shows only noise
LEAST_SLOWEST = 1.1


def page_data(models: Sequence[PhaseChain]) -> dict[str, Any]:
    """Return the data for the page's script: the `axes` that all runs have, the `charts`, and the `models`."""
    longest = [sum(len(run.metrics.steps) for run in model.runs) for model in models]
    size = 1 if sum(longest) <= MOST_STEPS else math.ceil(sum(longest) / DETAIL_BUCKETS)
    colours = colour_indices([model.objective for model in models])
    drawn: list[dict[str, Any]] = [
        {
            "name": masked(model.name),
            "runs": [run_data(run, axes, size) for run, axes in zip(model.runs, model.axes(), strict=True)],
            "colour": colour % 6,
        }
        for model, colour in zip(models, colours, strict=True)
    ]
    every_run = [run for model in drawn for run in model["runs"] if run["n"]]
    return {
        "axes": [axis for axis in AXES if every_run and all(axis in run["grid"] for run in every_run)],
        "charts": charts(shown_keys(models) & {key for run in every_run for key in run["series"]}),
        "models": drawn,
    }


def shown_keys(models: Sequence[PhaseChain]) -> set[str]:
    """Return the metrics keys with numbers, without `slowest_ratio` if it stays below LEAST_SLOWEST."""
    columns = [
        (masked(key), run.metrics.known(key)) for model in models for run in model.runs for key in run.metrics.columns
    ]
    return {key for key, known in columns if len(known) and (key != "slowest_ratio" or known.max() >= LEAST_SLOWEST)}


def charts(keys: Iterable[str]) -> list[dict[str, Any]]:
    """Return the descriptions of the charts that show at least one of `keys`."""
    drawn = []
    for name, wanted, title, unit, factor, flags in CHARTS:
        shown = [key for key in sorted(keys) if any(_fits(key, pattern) for pattern in wanted)]
        if shown:
            chart = {"id": name, "title": title, "unit": unit, "factor": factor, "keys": shown}
            drawn.append(chart | dict.fromkeys(flags, True))
    return drawn


def _fits(key: str, pattern: str) -> bool:
    return key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1]))


def run_data(run: RunDirectory, axes: dict[str, Column], size: int) -> dict[str, Any]:
    """Return a run's x on every axis, its curves and its marks. `size`: number of steps in a bucket of the detail."""
    count = len(run.metrics.steps)
    series = {}
    for key, column in run.metrics.columns.items():
        if any(_fits(key, pattern) for _, wanted, *_ in CHARTS for pattern in wanted) and not np.isnan(column).all():
            series[masked(key)] = series_data(column, size)
    ends = np.minimum(np.arange(size - 1, count + size - 1, size), count - 1) if count else np.empty(0, int)
    return {
        "phase": masked(run.phase),
        "n": len(ends),
        "grid": {axis: packed(values[ends], "<f8") for axis, values in axes.items()},
        "series": series,
        "span": {axis: [rounded(values[0]), rounded(values[-1])] for axis, values in axes.items() if count},
        "marks": marks(run, axes),
    }


def series_data(column: Column, size: int) -> dict[str, Any]:
    """Return a curve for the page's script.

    It has the values `y`, their number `n`, and an `overview` if it is long. A sparse curve has the `indices` of its
    points instead of gaps. Any other has `low` and `high` of each bucket if buckets have several steps (`size` > 1).
    """
    known = np.flatnonzero(~np.isnan(column))
    sparse = len(known) < DENSE * len(column)
    values = column[known] if sparse else column
    curve: dict[str, Any] = {}
    if sparse:
        curve |= {"indices": packed(known // size, "<u4"), "y": packed(values)}
    elif size > 1:
        low, middle, high = bucket_summary(values, size)
        curve |= {"low": packed(low), "y": packed(middle), "high": packed(high)}
    else:
        curve["y"] = packed(values)
    curve["n"] = len(known) if sparse else math.ceil(len(column) / size)
    if curve["n"] > OVERVIEW_BUCKETS:
        curve["overview"] = overview(values, curve["n"], 1 if sparse else size)
    return curve


def overview(values: Column, points: int, size: int) -> dict[str, Any]:
    """Summarize `points` points of `size` values in at most OVERVIEW_BUCKETS buckets of `each` points."""
    each = math.ceil(points / OVERVIEW_BUCKETS)
    low, middle, high = (list(map(rounded, part)) for part in bucket_summary(values, each * size))
    return {"each": each, "low": low, "y": middle, "high": high}


def packed(values: Any, dtype: str = "<f4") -> str:
    """Return numbers as base64 of their bytes in `dtype`."""
    with np.errstate(over="ignore"):
        return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def colour_indices(objectives: Sequence[str]) -> list[int]:
    """Return the index of each model's colour in the palette.

    The first encoder (mlm) gets 0 and the first decoder (clm) 1 on every page, in whatever order the runs were given.
    """
    indices, taken = [-1] * len(objectives), set[int]()
    for index, objective in enumerate(("mlm", "clm")):
        if objective in objectives:
            indices[objectives.index(objective)] = index
            taken.add(index)
    free = (index for index in range(len(objectives) + 2) if index not in taken)
    return [next(free) if index < 0 else index for index in indices]


def rounded(value: float) -> float | None:
    """Return a value rounded to five digits (twelve from 1e5 on), to keep the page small; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.5g}" if abs(value) < 1e5 else f"{value:.12g}")


def marks(run: RunDirectory, axes: dict[str, Column]) -> list[dict[str, Any]]:
    """Return restarts and bad steps, each with its type (`kind`), a text, and its x on every axis."""
    steps = run.metrics.steps
    if not len(steps):
        return []
    restarts = [
        ("restart", launch["step"], f"launched again after step {launch['step']:,}")
        for launch in run.restarts
        if isinstance(launch.get("step"), int)
    ]
    reasons = {step: str(entry.get("why")) for step, entry in run.bad_steps.items()} | run.metrics.bad_steps
    bad = [("bad", step, f"step {step:,}: {why}") for step, why in sorted(reasons.items())]
    drawn = []
    for mark, step, text in itertools.chain(restarts[:MOST_MARKS], bad[:MOST_MARKS]):
        index = min(max(int(np.searchsorted(steps, step)), 0), len(steps) - 1)
        drawn.append({"kind": mark, "text": masked(text), **{axis: float(x[index]) for axis, x in axes.items()}})
    return drawn
