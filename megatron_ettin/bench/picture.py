"""A benchmark's results as a PNG: bars of tokens/s, and MFU by two swept keys as a heat map."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from megatron_ettin.bench.results import DONE, name_of


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """PNG of the measurements that were made. `rows` is not empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = sorted((row for row in rows if row["state"] == DONE), key=lambda row: row["tokens_per_second_per_gpu"])
    keys = swept_keys(done)
    figure = Figure(figsize=(14, max(3.5, 0.4 * len(done) + 1.5)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if len(keys) == 2 else 1, squeeze=False)[0]
    speeds = [row["tokens_per_second_per_gpu"] for row in done]
    spread = [
        [abs(row["tokens_per_second_range"][side] / row["gpus"] - row["tokens_per_second_per_gpu"]) for row in done]
        for side in (0, 1)
    ]
    axes[0].barh([name_of(row) for row in done], speeds, xerr=spread, color="#4c78a8", ecolor="#555555", capsize=3)
    axes[0].set(title="Tokens a second of each GPU, median; slowest and fastest step", xlabel="tokens/s")
    axes[0].grid(axis="x", alpha=0.25)
    axes[0].spines[["top", "right"]].set_visible(False)
    if len(keys) == 2:
        heat_map(figure, axes[1], done, keys)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def swept_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values differ between measurements."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for word in row["words"]:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def heat_map(figure: Any, axes: Any, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """MFU by the values of two keys; the best where others differ too."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        given = dict(word.split("=", 1) for word in row["words"])
        place = (given.get(keys[0], "-"), given.get(keys[1], "-"))
        best[place] = max(best.get(place, 0.0), row["mfu"])
    across, down = (sorted({place[side] for place in best}) for side in (1, 0))
    grid = [[best.get((y, x), float("nan")) for x in across] for y in down]
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set(title="MFU", xlabel=keys[1], ylabel=keys[0])
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            axes.text(j, i, "-" if value != value else f"{value:.1%}", ha="center", va="center", color="white")
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
