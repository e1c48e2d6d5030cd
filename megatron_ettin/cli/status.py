"""Where jobs and runs stand: queue state, step, speed, time left, last checkpoint, restarts.

Examples:
  ettin status                      # all your jobs
  ettin status 123456               # a job or an array
  ettin status runs/1b-mlm          # a run, or all runs in a folder
  ettin status runs --watch
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import duration, printable

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ettin.launch.queue import Queued
    from megatron_ettin.launch.run_state import RunState

COLUMNS = (
    *("run", "model", "job", "state", "step", "done", "tokens/s", "left", "loss", "checkpoint", "restarts"),
    "slowest",
)
SILENT_SECONDS = 60.0  # worth a word from here on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", metavar="JOB|RUN", help="a job's number or a folder; default: your jobs")
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="with --watch (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one array of objects")


def run(args: argparse.Namespace) -> int:
    if args.every <= 0:
        raise UserError(f"--every {args.every:g}: must be more than 0 seconds")
    if args.watch and args.json:
        raise UserError("--json: without --watch; ask again as often as you like")
    if not args.watch:
        show(rows(args.what), args.json)
        return 0
    if not sys.stdout.isatty():
        while True:
            show(rows(args.what), False)
            time.sleep(args.every)
    from rich.live import Live

    with Live(table(rows(args.what)), refresh_per_second=2) as live:
        while True:
            time.sleep(args.every)
            live.update(table(rows(args.what)))


Row = tuple["RunState", "Queued | None"]


def rows(what: str | None) -> list[Row]:
    """Runs with their jobs. Raises UserError where there are none."""
    from megatron_ettin.launch.queue import own_jobs, shown

    if what is None:
        found = [row for job in own_jobs() for row in runs_of(job)]
        if not found:
            raise UserError("none of your jobs in the queue is of `ettin launch`; name a job or a run directory")
        return found
    if Path(what).is_dir():
        return rows_below(Path(what))
    if not what.replace("_", "").isdigit():
        raise UserError(f"{what}: no such folder, and not the number of a job")
    jobs = shown(what)
    if not jobs:
        raise UserError(f"job {what}: SLURM does not know it (any more); name its run directory")
    found = [row for job in jobs for row in runs_of(job)]
    if not found:
        raise UserError(f"job {what}: is not of `ettin launch`")
    return found


def rows_below(folder: Path) -> list[Row]:
    """All runs in a folder, with those that were submitted and have not begun."""
    from megatron_ettin.launch.queue import covers, shown
    from megatron_ettin.launch.run_state import read_events, run_state, runs_below, runs_of_event

    submitted = [Path(run) for event in read_events(folder / "slurm") for run in runs_of_event(event)]
    paths = list(dict.fromkeys([*(path.absolute() for path in runs_below(folder)), *submitted]))
    if not paths:
        raise UserError(f"{folder}: no run in it")
    states = [run_state(path) for path in paths]
    names = dict.fromkeys(state.job.partition("_")[0] for state in states if state.job)
    jobs = [job for name in names for job in shown(name)]
    return [(state, next((job for job in jobs if covers(job.id, state.job)), None)) for state in states]


def runs_of(job: Queued) -> list[Row]:
    """Of a job: the runs of its submission that are its own."""
    from megatron_ettin.launch.queue import covers
    from megatron_ettin.launch.run_state import read_events, run_state, runs_of_event

    if job.log is None or job.log.parent.name != "slurm":
        return []
    whole = job.id.partition("_")[0]
    for event in read_events(job.log.parent):
        if event["event"] == "submitted" and event.get("job") == whole:
            states = [run_state(Path(path)) for path in runs_of_event(event)]
            return [(state, job) for state in states if covers(job.id, state.job)]
    return []


def show(found: list[Row], as_json: bool) -> None:
    if as_json:
        print(json.dumps([as_object(*row) for row in found], indent=1))
        return
    if sys.stdout.isatty():
        from rich import print as rich_print

        rich_print(table(found))
        return
    for row in found:
        print("  ".join(f"{name} {text}" for name, text in zip(COLUMNS, cells(*row), strict=True) if text), flush=True)


def as_object(state: RunState, job: Queued | None) -> dict[str, Any]:
    """The keys that scripts read."""
    record = dataclasses.asdict(state) | {"run": str(state.run), "fraction": state.fraction}
    of_queue = {name: getattr(job, name) if job else None for name in ("state", "reason", "nodes")}
    return record | of_queue


def table(found: list[Row]) -> Table:
    from rich.table import Table

    drawn = Table(*COLUMNS, box=None)
    for row in found:
        drawn.add_row(*cells(*row))
    return drawn


def cells(state: RunState, job: Queued | None) -> tuple[str, ...]:
    """A row of the table."""
    from megatron_ettin.base.text import format_count

    saved = "" if state.checkpoint_step is None else f"{state.checkpoint_step:,}"
    saved += f" ({duration(state.checkpoint_age_seconds)} ago)" if state.checkpoint_age_seconds is not None else ""
    requeued = max(state.launches - 1, 0)
    shown = (
        from_here(state.run),
        state.model or "",
        state.job or "",
        queue_state(state, job),
        "" if state.step is None else f"{state.step:,}" + (f"/{state.total_steps:,}" if state.total_steps else ""),
        "" if state.fraction is None else f"{state.fraction:.1%}",
        "" if state.tokens_per_second is None else format_count(round(state.tokens_per_second)),
        "" if state.seconds_left is None else duration(state.seconds_left),
        "" if state.loss is None else f"{state.loss:.4f}",
        saved,
        f"{requeued} requeued, {state.failures} failed" if requeued or state.failures else "",
        "" if state.slowest_ratio is None else slowest(state),
    )
    return tuple(map(printable, shown))


def from_here(path: Path) -> str:
    """Relative where it is below the current folder: a table of long paths does not fit a terminal."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def slowest(state: RunState) -> str:
    """`rank 3 on n2, 1.62x`: its seconds to the median of the others."""
    return f"rank {state.slowest_rank} on {state.slowest_host}, {state.slowest_ratio:.2f}x"


def queue_state(state: RunState, job: Queued | None) -> str:
    """What SLURM says, and what the run does where that is not to train."""
    if job is None:
        return "done" if state.last_event == "done" or state.fraction == 1.0 else "not queued"
    if job.state == "PENDING":
        return f"PENDING ({job.reason})"
    if job.state != "RUNNING":
        return job.state
    told = [job.state] if state.doing in (None, "step") else [job.state, str(state.doing)]
    silent = state.silent_seconds or 0.0
    return ", ".join([*told, *([f"silent for {duration(silent)}"] if silent > SILENT_SECONDS else [])])
