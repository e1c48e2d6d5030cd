"""What came out of a sweep: a table, sweep.json and sweep.png in its folder."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.files import write_atomically
from megatron_ettin.config.overrides import Member
from megatron_ettin.metrics import METRICS_FILE, read_metrics
from megatron_ettin.report.curves import COLOURS, medians
from megatron_ettin.report.page import LAST_STEPS


def summarise(folder: Path, members: Sequence[Member]) -> str:
    """Read the members' metrics, write sweep.json and sweep.png, return the table. Members that have not begun are
    named as such."""
    rows = [_row(folder / member.name, member) for member in members]
    found = [row for row in rows if row["final_loss"] is not None]
    for group in _groups(found, "objective"):
        min(group, key=lambda row: row["final_loss"])["best"] = True
    public = [{key: value for key, value in row.items() if key != "lines"} for row in rows]
    write_atomically(folder / "sweep.json", json.dumps(public, indent=1) + "\n")
    if found:
        (folder / "sweep.png").write_bytes(picture(found))
    return table(rows)


def _row(path: Path, member: Member) -> dict[str, Any]:
    lines = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else []
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    held_out = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return {
        "name": member.name,
        "values": member.values,
        "steps": len(lines),
        "tokens": max((line["tokens"] for line in lines), default=0),
        "final_loss": statistics.fmean(losses[-LAST_STEPS:]) if losses else None,
        "validation_loss": held_out[-1] if held_out else None,
        "best": False,
        "lines": lines,
    }


def _groups(rows: Sequence[dict[str, Any]], key: str) -> list[list[dict[str, Any]]]:
    """Rows whose losses can be compared: of one objective where objectives are swept."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["values"].get(key, ""), []).append(row)
    return list(groups.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  steps  final loss  validation"]
    for row in rows:
        if not row["steps"]:
            lines.append(f"{row['name']:{width}}  not begun")
            continue
        loss, held_out = (
            f"{row[key]:.4f}" if row[key] is not None else "-" for key in ("final_loss", "validation_loss")
        )
        lines.append(f"{row['name']:{width}}  {row['steps']:5}  {loss:>10}  {held_out:>10}{'  best' * row['best']}")
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Losses against tokens and, where a swept key has numbers, the final loss against it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    key = _numeric_key(rows)
    axes = figure.subplots(1, 2 if key else 1, squeeze=False)[0]
    for number, row in enumerate(rows):
        points = [(line["tokens"], line["loss"]) for line in row["lines"] if line.get("loss") is not None]
        axes[0].plot(*zip(*medians(*zip(*points))), color=COLOURS[number % len(COLOURS)], label=row["name"])
    axes[0].set(title="Training loss", xlabel="tokens")
    axes[0].legend(frameon=False, fontsize=8)
    if key:
        others: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            rest = " ".join(f"{name}={value}" for name, value in row["values"].items() if name != key)
            others.setdefault(rest, []).append((float(row["values"][key]), row["final_loss"]))
        for name, points in others.items():
            axes[1].plot(*zip(*sorted(points)), "o-", label=name or None)
        axes[1].set(title=f"Final loss by {key}", xlabel=key)
        if all(x > 0 for points in others.values() for x, _ in points):
            axes[1].set_xscale("log")
        if len(others) > 1:
            axes[1].legend(frameon=False, fontsize=8)
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def _numeric_key(rows: Sequence[dict[str, Any]]) -> str | None:
    """The first swept key whose values are numbers."""
    for key in rows[0]["values"]:
        try:
            if len({float(row["values"][key]) for row in rows}) > 1:
                return str(key)
        except ValueError:
            continue
    return None
