"""Draw a benchmark's results: bars of tokens/s, and a heat map of MFU by layout and the other swept keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_ettin.base import plots
from megatron_ettin.bench.results import DONE

LAYOUT = tuple(f"parallel.{axis}" for axis in ("tp", "pp", "vpp", "cp", "sequence_parallel"))
SortKey = list[tuple[float, str]]


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of the rows whose state is `done`; there must be at least one."""
    done = sorted((row for row in rows if row["state"] == DONE), key=lambda row: row["tokens_per_second_per_gpu"])
    keys = swept_keys(done)
    sides = heat_sides(keys)
    columns = len({label(overrides(row), sides[1]) for row in done}) if sides else 0
    widths = [8.0, max(4.0, 0.7 * columns + 3)] if sides else [10.0]
    figure = plots.new_figure(sum(widths), max(3.5, 0.3 * len(done) + 1.5))
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    speeds = [row["tokens_per_second_per_gpu"] for row in done]
    spread = [
        [abs(row["tokens_per_second_range"][side] / row["gpus"] - row["tokens_per_second_per_gpu"]) for row in done]
        for side in (0, 1)
    ]
    names = [label(overrides(row), keys) or f"{row['size']} {row['objective']}" for row in done]
    plots.draw_bars(axes[0], names, speeds, spread, [f"MFU {row['mfu']:.1%}" for row in done])
    axes[0].set(title="Tokens per second of each GPU, median; slowest and fastest step", xlabel="tokens/s")
    if sides:
        plots.draw_heat_map(axes[1], *best_mfu(done, *sides))
        axes[1].set(title="MFU")
    return plots.encode(figure)


def label(values: dict[str, str], keys: Sequence[str]) -> str:
    """Return the values of `keys` as a short label: `tp 2 pp 2, precision bf16, micro_batch_rows 4`."""
    parts = []
    if any(key in LAYOUT for key in keys):
        degrees = [(key.partition(".")[2], values.get(key, "1")) for key in LAYOUT[:4] if key in keys]
        sharded = ["sp"] if LAYOUT[4] in keys and values.get(LAYOUT[4]) == "true" else []
        parts.append(" ".join([f"{axis} {size}" for axis, size in degrees if size != "1"] + sharded) or "dp")
    for key in keys:
        if key not in LAYOUT:
            parts.append(f"{key.removesuffix('.name').rpartition('.')[2]} {values.get(key, '-')}")
    return ", ".join(parts)


def overrides(row: dict[str, Any]) -> dict[str, str]:
    """Return the size, objective and overrides of a result, by key; of a key that is given twice, the last value."""
    given = dict(word.split("=", 1) for word in row["words"])
    return {"size": row["size"], "objective": row["objective"], **given}


def swept_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between measurements."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in overrides(row).items():
            values.setdefault(key, set()).add(value)
    return [key for key, different in values.items() if len(different) > 1]


def heat_sides(keys: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Split keys into those of the rows and those of the columns of the heat map.

    Rows are the keys of the layout, columns all other keys. If one side would be empty, rows are the first key and
    columns the rest. Return None for fewer than two keys.
    """
    if len(keys) < 2:
        return None
    down = [key for key in keys if key in LAYOUT]
    if not down or len(down) == len(keys):
        down = list(keys[:1])
    return down, [key for key in keys if key not in down]


def best_mfu(
    rows: Sequence[dict[str, Any]], down: list[str], across: list[str]
) -> tuple[list[str], list[str], np.ndarray]:
    """Return the names of rows and columns, and the best MFU of each combination [rows, columns], NaN if unmeasured."""
    best: dict[tuple[str, str], float] = {}
    lines: dict[str, SortKey] = {}
    columns: dict[str, SortKey] = {}
    for row in rows:
        values = overrides(row)
        line, column = label(values, down), label(values, across)
        lines[line] = in_order([values.get(key, "-") for key in down])
        columns[column] = in_order([values.get(key, "-") for key in across])
        best[line, column] = max(best.get((line, column), 0.0), row["mfu"])
    sides = sorted(lines, key=lines.__getitem__), sorted(columns, key=columns.__getitem__)
    return *sides, np.array([[best.get((y, x), np.nan) for x in sides[1]] for y in sides[0]])


def in_order(values: Sequence[str]) -> SortKey:
    """Return a sort key: numbers by their size, words by the alphabet."""
    return [(float(value), "") if value.isdecimal() else (float("inf"), value) for value in values]
