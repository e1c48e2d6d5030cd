"""Show where jobs and runs stand: queue state, step, speed, time left, last checkpoint, restarts.

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

    from megatron_ettin.launch.run_state import QueuedJob, RunState

COLUMNS = (
    *("run", "model", "job", "state", "step", "done", "tokens/s", "left", "loss", "checkpoint", "restarts"),
    "slowest",
)
# `queue_state` reports a job that has been silent for longer
SILENT_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("what", nargs="?", metavar="JOB|RUN", help="a job's number or a folder; default: your jobs")
    add("--watch", action="store_true", help="refresh until Ctrl-C")
    add("--every", type=float, above=0, default=10.0, metavar="SECONDS", help="with --watch (%(default)s)")
    add("--json", help="print one array of objects")


def run(args: argparse.Namespace) -> int:
    """Print the rows once and return 0, or every --every seconds with --watch."""
    if args.watch and args.json:
        raise UserError("--json: cannot be combined with --watch; repeat the command instead")
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


Row = tuple["RunState", "QueuedJob | None"]


def rows(what: str | None) -> list[Row]:
    """Return runs with their jobs. Raises UserError if there are none.

    Args:
        what: the number of a job or an array, or the folder of a run or of runs; None for all jobs of the user.
    """
    from megatron_ettin.launch.run_state import own_jobs, query_jobs

    if what is None:
        own = [row for job in own_jobs() for row in runs_of(job)]
        if not own:
            raise UserError("no job of yours in the queue comes from `ettin launch`; name a job or a run directory")
        return own
    if Path(what).is_dir():
        return rows_below(Path(what))
    if not what.replace("_", "").isdigit():
        raise UserError(f"{what}: no such folder, and not a job number")
    jobs = query_jobs(what)
    if not jobs:
        raise UserError(f"job {what}: SLURM does not know it (any more); name its run directory")
    submitted = [row for job in jobs for row in runs_of(job)]
    if not submitted:
        raise UserError(f"job {what}: was not submitted by `ettin launch`; name its run directory")
    return submitted


def rows_below(folder: Path) -> list[Row]:
    """Return all runs in a folder with their jobs, also submitted runs that have not begun. Raises UserError."""
    from megatron_ettin.launch.run_state import covers, query_jobs, read_events, run_state, runs_below, runs_of_event

    submitted = [Path(run) for event in read_events(folder / "slurm") for run in runs_of_event(event)]
    paths = list(dict.fromkeys([*(path.absolute() for path in runs_below(folder)), *submitted]))
    if not paths:
        raise UserError(f"{folder}: no run in it")
    states = [run_state(path) for path in paths]
    names = dict.fromkeys(state.job.partition("_")[0] for state in states if state.job)
    jobs = [job for name in names for job in query_jobs(name)]
    return [(state, next((job for job in jobs if covers(job.id, state.job)), None)) for state in states]


def runs_of(job: QueuedJob) -> list[Row]:
    """Return the runs of a job, from its submission's record; empty if `ettin launch` did not submit it."""
    from megatron_ettin.launch.run_state import covers, read_events, run_state, runs_of_event

    if job.log is None or job.log.parent.name != "slurm":
        return []
    whole = job.id.partition("_")[0]
    for event in read_events(job.log.parent):
        if event["event"] == "submitted" and event.get("job") == whole:
            states = [run_state(Path(path)) for path in runs_of_event(event)]
            return [(state, job) for state in states if covers(job.id, state.job)]
    return []


def show(shown: list[Row], as_json: bool) -> None:
    """Print the rows: JSON for scripts, a table on a terminal, plain lines elsewhere."""
    if as_json:
        print(json.dumps([as_object(*row) for row in shown], indent=1))
        return
    if sys.stdout.isatty():
        from rich import print as rich_print

        rich_print(table(shown))
        return
    for row in shown:
        print("  ".join(f"{name} {text}" for name, text in zip(COLUMNS, cells(*row), strict=True) if text), flush=True)


def as_object(state: RunState, job: QueuedJob | None) -> dict[str, Any]:
    """Return the object that `--json` prints for a run and its job."""
    record = dataclasses.asdict(state) | {"run": str(state.run), "fraction": state.fraction}
    queue_fields = {name: getattr(job, name) if job else None for name in ("state", "reason", "nodes")}
    return record | queue_fields


def table(shown: list[Row]) -> Table:
    """Return the rows as a table for a terminal."""
    from rich.table import Table

    drawn = Table(*COLUMNS, box=None)
    for row in shown:
        drawn.add_row(*cells(*row))
    return drawn


def cells(state: RunState, job: QueuedJob | None) -> tuple[str, ...]:
    """Return the cells of a row of the table, in the order of COLUMNS."""
    from megatron_ettin.base.text import format_count

    saved = "" if state.checkpoint_step is None else f"{state.checkpoint_step:,}"
    saved += f" ({duration(state.checkpoint_age_seconds)} ago)" if state.checkpoint_age_seconds is not None else ""
    requeued = max(state.launches - 1, 0)
    shown = (
        relative(state.run),
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


def relative(path: Path) -> str:
    """Return the path, relative to the current folder if it is below it, so that the table fits a terminal."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def slowest(state: RunState) -> str:
    """Return the slowest rank and its seconds divided by the median of the others: `rank 3 on n2, 1.62x`."""
    return f"rank {state.slowest_rank} on {state.slowest_host}, {state.slowest_ratio:.2f}x"


def queue_state(state: RunState, job: QueuedJob | None) -> str:
    """Return the job's state in the queue, with the run's activity if that is not a step, and any long silence."""
    if job is None:
        return "done" if state.last_event == "done" or state.fraction == 1.0 else "not queued"
    if job.state == "PENDING":
        return f"PENDING ({job.reason})"
    if job.state != "RUNNING":
        return job.state
    parts = [job.state] if state.doing in (None, "step") else [job.state, str(state.doing)]
    silent = state.silent_seconds or 0.0
    return ", ".join([*parts, *([f"silent for {duration(silent)}"] if silent > SILENT_SECONDS else [])])
