"""Summarize a sweep as a table, and as sweep.json and sweep.png in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.plots import Curve, Panel, draw_row
from megatron_ettin.base.text import counted
from megatron_ettin.config.overrides import Member
from megatron_ettin.metrics.record import METRICS_FILE
from megatron_ettin.runs.chain import final_loss
from megatron_ettin.runs.directory import RunDirectory


def summarise(folder: Path, members: Sequence[Member]) -> str:
    """Write sweep.json and sweep.png of a sweep into `folder`, and return the table of its members, begun or not."""
    rows = [_row(folder / member.name, member) for member in members]
    begun = [row for row in rows if row["final_loss"] is not None]
    # losses of different objectives cannot be compared
    for objective in {row["values"].get("objective", "") for row in begun}:
        same = [row for row in begun if row["values"].get("objective", "") == objective]
        min(same, key=lambda row: row["final_loss"])["best"] = True
    public = [{key: value for key, value in row.items() if key != "metrics"} for row in rows]
    write_atomically(folder / "sweep.json", json.dumps(public, indent=1) + "\n")
    if begun:
        (folder / "sweep.png").write_bytes(picture(begun))
    return table(rows)


def _row(path: Path, member: Member) -> dict[str, Any]:
    run = RunDirectory(path)
    if run.metrics.unreadable_lines:
        lines = counted(run.metrics.unreadable_lines, "line")
        log_warning(f"warning: {path / METRICS_FILE}: {lines} cannot be read; left out")
    return {
        "name": member.name,
        "values": member.values,
        "steps": len(run.metrics.steps),
        "tokens": run.tokens,
        "final_loss": final_loss(run.metrics.known("loss").tolist()),
        "validation_loss": run.metrics.last("validation_loss"),
        "best": False,
        "metrics": run.metrics,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the members, as text."""
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
    """Return a PNG of losses against tokens and, if a swept key is numeric, of the final loss against that key."""
    curves = []
    for number, row in enumerate(rows):
        tokens, loss = row["metrics"].columns["tokens"], row["metrics"].columns["loss"]
        known = ~np.isnan(loss)
        curves.append(Curve(row["name"], number, [(tokens[known], loss[known])], thin=True, smooth=True))
    panels = [Panel("Training loss", "tokens", curves)]
    if key := _numeric_key(rows):
        others: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            rest = " ".join(f"{name}={value}" for name, value in row["values"].items() if name != key)
            others.setdefault(rest, []).append((float(row["values"][key]), row["final_loss"]))
        curves = []
        for number, (name, points) in enumerate(others.items()):
            x, y = np.array(sorted(points), float).T
            curves.append(Curve(name or "final loss", number, [(x, y)], is_sparse=True))
        is_positive = all(x > 0 for points in others.values() for x, _ in points)
        panels.append(Panel(f"Final loss by {key}", key, curves, log_base=10 if is_positive else None))
    return draw_row(panels)


def _numeric_key(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the first swept key whose values are numbers that differ; None if there is none."""
    for key in rows[0]["values"]:
        try:
            if len({float(row["values"][key]) for row in rows}) > 1:
                return str(key)
        except ValueError:
            continue
    return None
