"""A benchmark's results as a PNG: bars of tokens/s, and MFU by layout and the other swept keys as a heat map."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from megatron_ettin.bench.results import DONE

LAYOUT = tuple(f"parallel.{axis}" for axis in ("tp", "pp", "vpp", "cp", "sequence_parallel"))
MOST_LEVEL = 4  # columns whose names stand level beside each other
Order = list[tuple[float, str]]


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """PNG of the measurements that were made. `rows` is not empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = sorted((row for row in rows if row["state"] == DONE), key=lambda row: row["tokens_per_second_per_gpu"])
    keys = swept_keys(done)
    sides = heat_sides(keys)
    columns = len({label(given(row), sides[1]) for row in done}) if sides else 0
    widths = [8.0, max(4.0, 0.7 * columns + 3)] if sides else [10.0]
    figure = Figure(figsize=(sum(widths), max(3.5, 0.3 * len(done) + 1.5)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    bars(axes[0], done, keys)
    if sides:
        heat_map(figure, axes[1], done, *sides)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def bars(axes: Any, done: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Speeds, with MFU beside them."""
    speeds = [row["tokens_per_second_per_gpu"] for row in done]
    spread = [
        [abs(row["tokens_per_second_range"][side] / row["gpus"] - row["tokens_per_second_per_gpu"]) for row in done]
        for side in (0, 1)
    ]
    drawn = axes.barh(range(len(done)), speeds, xerr=spread, color="#4c78a8", ecolor="#555555", capsize=3)
    axes.bar_label(drawn, [f"MFU {row['mfu']:.1%}" for row in done], padding=4, fontsize=8)
    names = [label(given(row), keys) or f"{row['size']} {row['objective']}" for row in done]
    axes.set_yticks(range(len(done)), names, fontsize=8)
    axes.margins(x=0.15)
    axes.set(title="Tokens a second of each GPU, median; slowest and fastest step", xlabel="tokens/s")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label(values: dict[str, str], keys: Sequence[str]) -> str:
    """What sets a measurement apart, short: `tp 2 pp 2, precision bf16, micro_batch_rows 4`."""
    parts = []
    if any(key in LAYOUT for key in keys):
        degrees = [(key.partition(".")[2], values.get(key, "1")) for key in LAYOUT[:4] if key in keys]
        cut = ["sp"] if LAYOUT[4] in keys and values.get(LAYOUT[4]) == "true" else []
        parts.append(" ".join([f"{axis} {size}" for axis, size in degrees if size != "1"] + cut) or "dp")
    for key in keys:
        if key not in LAYOUT:
            parts.append(f"{key.removesuffix('.name').rpartition('.')[2]} {values.get(key, '-')}")
    return ", ".join(parts)


def given(row: dict[str, Any]) -> dict[str, str]:
    """What may be swept: size, objective and keys, the last of a key that is given twice."""
    words = dict(word.split("=", 1) for word in row["words"])
    return {"size": row["size"], "objective": row["objective"], **words}


def swept_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values differ between measurements."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in given(row).items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def heat_sides(keys: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """(keys down, keys across): layouts against all others; without layouts, or with nothing else, the first key
    against the rest. None for fewer than two keys."""
    if len(keys) < 2:
        return None
    down = [key for key in keys if key in LAYOUT]
    if not down or len(down) == len(keys):
        down = list(keys[:1])
    return down, [key for key in keys if key not in down]


def heat_map(figure: Any, axes: Any, rows: Sequence[dict[str, Any]], down: list[str], across: list[str]) -> None:
    """MFU by the values of the keys of both sides."""
    best: dict[tuple[str, str], float] = {}
    sides: tuple[dict[str, Order], ...] = ({}, {})  # names, and what orders them
    for row in rows:
        values = given(row)
        place = label(values, down), label(values, across)
        for side, name, keys in zip(sides, place, (down, across)):
            side[name] = in_order([values.get(key, "-") for key in keys])
        best[place] = max(best.get(place, 0.0), row["mfu"])
    lines, columns = (sorted(side, key=side.__getitem__) for side in sides)
    grid = [[best.get((y, x), float("nan")) for x in columns] for y in lines]
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set(title="MFU")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    if len(columns) > MOST_LEVEL:
        axes.tick_params(axis="x", rotation=90)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    middle = (min(best.values()) + max(best.values())) / 2
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            colour = "black" if value > middle or value != value else "white"
            axes.text(
                j, i, "-" if value != value else f"{value:.1%}", ha="center", va="center", color=colour, fontsize=8
            )
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")


def in_order(values: Sequence[str]) -> Order:
    """To sort by: numbers by their size, words by the alphabet."""
    return [(float(value), "") if value.isdecimal() else (float("inf"), value) for value in values]
