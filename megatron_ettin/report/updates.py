"""Find the updates that a run skipped by its own record: metrics.jsonl, and the counts of its newest checkpoint.

Lines of older versions have no `updated`. A step that they call skipped was left out. For one that they call ignored
nothing is known, because its update was left out under some settings and made under others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import list_checkpoints, read_progress, step_of

# ranges of steps that a line names
MOST_RANGES = 12
# step -> its line in metrics.jsonl
Steps = Mapping[int, Mapping[str, Any]]


def left_out(steps: Steps) -> list[int]:
    """Return the steps whose updates were left out."""
    return [
        step
        for step, line in steps.items()
        if line.get("updated") is False or str(line.get("bad", "")).startswith("skipped")
    ]


def unproven(run_dir: Path, steps: Steps) -> str | None:
    """Return why the record does not prove which updates were made; None where it does."""
    unclear = [s for s, line in steps.items() if "updated" not in line and str(line.get("bad")).startswith("ignored")]
    counted = newest_count(run_dir)
    if counted is not None:
        reached, count = counted
        known = sum(step <= reached for step in left_out(steps))
        if count != known:
            return (
                f"{run_dir}: the checkpoint of step {reached:,} counts {count:,} updates that were left out,"
                f" metrics.jsonl names {known:,}"
            )
        unclear = [step for step in unclear if step > reached]
    return f"{run_dir}: whether the update of step {unclear[0]} was made was not recorded" if unclear else None


def newest_count(run_dir: Path) -> tuple[int, int] | None:
    """Return the step of the newest checkpoint with a count of skipped updates, and the count."""
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            count = read_progress(checkpoint).get("skipped")
        except UserError:
            continue
        if isinstance(count, int):
            return step_of(checkpoint), count
    return None


def format_steps(steps: Sequence[int]) -> str:
    """Return steps in words: `3, 7 to 9`; `none`."""
    groups = itertools.groupby(enumerate(sorted(steps)), key=lambda pair: pair[1] - pair[0])
    consecutive = [[step for _, step in group] for _, group in groups]
    ranges = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in consecutive]
    more = f" and {len(ranges) - MOST_RANGES} more ranges" if len(ranges) > MOST_RANGES else ""
    return ", ".join(ranges[:MOST_RANGES]) + more or "none"
