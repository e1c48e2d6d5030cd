"""Define the findings of `ettin doctor`: one line each, with advice if something is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# from best to worst; a note is a gap that costs nothing or is on purpose
STATES = ("ok", "note", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    """Name of the check."""
    state: str
    """One of STATES."""
    text: str
    """Result in one line."""
    todo: str = ""
    """Advice for a warning or problem."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Values for scripts; units are part of the names."""


def ok(name: str, text: str, **figures: Any) -> Finding:
    """Return a finding about a check that passed."""
    return Finding(name, "ok", text, figures=figures)


def note(name: str, text: str, **figures: Any) -> Finding:
    """Return a finding about a gap that costs nothing or is on purpose."""
    return Finding(name, "note", text, figures=figures)


def warning(name: str, text: str, todo: str, **figures: Any) -> Finding:
    """Return a finding about a lack that costs speed or comfort, or may end a run one day."""
    return Finding(name, "warning", text, todo, figures)


def problem(name: str, text: str, todo: str, **figures: Any) -> Finding:
    """Return a finding about a fault that would stop a run or make its results wrong."""
    return Finding(name, "problem", text, todo, figures)


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst state of the findings; `ok` if there are none."""
    return max((finding.state for finding in findings), key=STATES.index, default="ok")


def count_states(findings: Iterable[Finding]) -> str:
    """Return how many findings have each state: `12 ok, 1 warning`."""
    states = [finding.state for finding in findings]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


def format_flops(rate: float) -> str:
    """Format operations per second: `51 GFLOP/s`, `612 TFLOP/s`."""
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
