"""What `profile.*` asks for: steps `A:B` (A to B - 1, counted as in metrics.jsonl) on some ranks."""

from __future__ import annotations

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import Config

MOST_STEPS = 50  # a trace of a step is megabytes, and is held in memory until it is written


def profiled_steps(config: Config) -> range:
    """Steps from 1; empty where none are asked for. Raises UserError."""
    text = config.profile.steps
    if text is None:
        return range(0)
    first, colon, end = str(text).partition(":")
    if not (first.isdigit() and int(first) >= 1 and (not colon or (end.isdigit() and int(end) > int(first)))):
        raise UserError(f"profile.steps: {text!r} is not A:B (steps A to B - 1, from 1 on) or a single step")
    steps = range(int(first), int(end) if colon else int(first) + 1)
    if len(steps) > MOST_STEPS:
        raise UserError(f"profile.steps: {text} are {len(steps):,} steps; at most {MOST_STEPS}, for all are in memory")
    return steps


def profiled_ranks(config: Config) -> tuple[int, ...] | None:
    """None: all of them. Raises UserError."""
    text = str(config.profile.ranks)
    if text == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"profile.ranks: {text!r} is neither 'all' nor numbers of ranks such as 0,8")
    return tuple(int(part) for part in parts)


def check_profile(config: Config) -> None:
    profiled_steps(config)
    profiled_ranks(config)
