"""history.jsonl of a run directory: one object a launch, the first of which says where the run began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ettin.base.json_reading import load_json

HISTORY = "history.jsonl"


def read_launches(run_dir: Path, unreadable: list[int] | None = None) -> list[dict[str, Any]]:
    """Return every launch's record, oldest first.

    Lines that a full disk or a kill has torn are left out; their numbers go to `unreadable`."""
    try:
        lines = (run_dir / HISTORY).read_bytes().splitlines()
    except OSError:
        return []
    launches = []
    for number, line in enumerate(lines, start=1):
        try:
            found = load_json(line) if line.strip() else {}
        except ValueError:
            found = None
        if isinstance(found, dict):
            launches += [found] if found else []
        elif unreadable is not None:
            unreadable.append(number)
    return launches


def allowed_changes(launch: dict[str, Any]) -> list[str]:
    """The science keys that a launch was allowed to change, by its record."""
    changes = launch.get("changes")
    return [key for key in changes if isinstance(key, str)] if isinstance(changes, list) else []


def first_launch(run_dir: Path) -> dict[str, Any] | None:
    """The first launch's record; None for a run that has not begun (or whose record cannot be read)."""
    try:
        with open(run_dir / HISTORY, encoding="utf-8") as file:
            record = load_json(file.readline())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
