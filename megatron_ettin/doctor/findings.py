"""What `ettin doctor` has found out: one line each, and what to do where something is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

STATES = ("ok", "note", "warning", "problem")  # ever worse; a note is a gap that costs nothing or is on purpose


@dataclass(frozen=True)
class Finding:
    """`name`: what was looked at; `text`: one line; `todo`: what to do, of a warning or problem; `figures`: what
    scripts read, units in their names."""

    name: str
    state: str
    text: str
    todo: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def ok(name: str, text: str, **figures: Any) -> Finding:
    return Finding(name, "ok", text, figures=figures)


def note(name: str, text: str, **figures: Any) -> Finding:
    return Finding(name, "note", text, figures=figures)


def warning(name: str, text: str, todo: str, **figures: Any) -> Finding:
    """Costs speed or comfort, or may end a run one day."""
    return Finding(name, "warning", text, todo, figures)


def problem(name: str, text: str, todo: str, **figures: Any) -> Finding:
    """A run would stop, or compute something else."""
    return Finding(name, "problem", text, todo, figures)


def worst(found: Iterable[Finding]) -> str:
    """The worst state of all; `ok` of none."""
    return max((finding.state for finding in found), key=STATES.index, default="ok")


def flops_text(rate: float) -> str:
    """Operations a second: `51 GFLOP/s`, `612 TFLOP/s`."""
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
