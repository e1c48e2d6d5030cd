"""history.jsonl of a run directory: one object a launch, the first of which says where the run began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ettin.config.json_reading import load_json

HISTORY = "history.jsonl"


def read_launches(run_dir: Path) -> list[dict[str, Any]]:
    """Every launch's record, oldest first. Lines that a full disk or a kill has torn are left out."""
    try:
        lines = (run_dir / HISTORY).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(load_json(line))
        except ValueError:
            continue
    return [record for record in found if isinstance(record, dict)]


def first_launch(run_dir: Path) -> dict[str, Any] | None:
    """The first launch's record; None for a run that has not begun (or whose record cannot be read)."""
    try:
        with open(run_dir / HISTORY, encoding="utf-8") as file:
            record = load_json(file.readline())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
