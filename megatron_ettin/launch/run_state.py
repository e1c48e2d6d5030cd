"""Read the state of jobs and runs from SLURM, run directories and the jobs' events.

This module does not import torch, so that `ettin status` starts quickly.
"""

from __future__ import annotations

import getpass
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import read_json_lines, read_json_object
from megatron_ettin.checkpoint.directory import step_of
from megatron_ettin.config.tables import short_name
from megatron_ettin.metrics.record import METRICS_FILE
from megatron_ettin.parallel.failure_report import HEARTBEAT
from megatron_ettin.runs.directory import CONFIG, RunDirectory, find_runs

# number of latest steps whose median is the speed
SPEED_STEPS = 20
# timeout of a SLURM command
SLURM_SECONDS = 30.0


@dataclass(frozen=True)
class RunState:
    """State of a run; fields that are not known are None."""

    run: Path
    model: str | None
    """Size, objective and phase: `17m mlm pretrain`."""
    step: int | None
    tokens: int | None
    total_tokens: int | None
    total_steps: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    """Estimated seconds to the end of the phase, at the speed of the latest steps."""
    loss: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    silent_seconds: float | None
    """Seconds since the last step or heartbeat."""
    doing: str | None
    """Phase in the latest heartbeat."""
    job: str | None
    """Id of the latest job that was submitted for it."""
    failures: int
    """Number of failed attempts and unusable nodes of the job."""
    launches: int
    """Number of starts of the job's script: one more than its requeues."""
    last_event: str | None
    """Latest event of the job: started, failed, saved, requeued, done or mistake."""
    slowest_rank: int | None
    """Slowest rank when ranks were last compared (metrics.ranks_every_steps)."""
    slowest_host: str | None
    slowest_ratio: float | None
    """Step seconds of the slowest rank, divided by the median of the others."""
    last_stall: str | None
    """Line of the watchdogs' report about the latest stall."""

    @property
    def fraction(self) -> float | None:
        """Return the finished part of the phase, 0 to 1, by steps or by tokens."""
        if self.total_steps and self.step is not None:
            return min(1.0, self.step / self.total_steps)
        return min(1.0, self.tokens / self.total_tokens) if self.total_tokens and self.tokens is not None else None


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield `folder` if it is a run directory, else those below it, also runs with metrics but no configuration."""
    return find_runs(folder, marks=(CONFIG, METRICS_FILE))


def run_state(run: Path) -> RunState:
    """Return the state of one run. A run that has not begun has None in most fields."""
    directory = RunDirectory(run)
    lines = directory.last_metrics
    keys = ("slowest_rank", "slowest_host", "slowest_ratio")
    compared: dict[str, Any] = next((line for line in reversed(lines) if all(key in line for key in keys)), {})
    if _number(compared.get("slowest_ratio")) is None:
        compared = {}
    last = lines[-1] if lines else {}
    try:
        groups = directory.stored_groups
    except UserError:
        groups = {}
    settings = groups["run"] if isinstance(groups.get("run"), dict) else {}
    folder, job, task = submission_of(run)
    events = [event for event in read_events(folder) if event.get("job") == task] if folder else []
    checkpoint = directory.newest_checkpoint
    saved = None if checkpoint is None else _time_of(checkpoint)
    heartbeat, heartbeat_time = _read_heartbeat(folder, task)
    activity = [seen for seen in (heartbeat_time, _time_of(run / METRICS_FILE)) if seen is not None]
    return RunState(
        run=run,
        model=_model(settings, groups.get("model")),
        step=_count(last.get("step")),
        tokens=_count(last.get("tokens")),
        total_tokens=_count(settings.get("tokens")),
        total_steps=_count(settings.get("steps")),
        tokens_per_second=_median(lines, "tokens_per_second"),
        seconds_left=_seconds_left(lines, settings),
        loss=_number(last.get("loss")),
        checkpoint_step=None if checkpoint is None else step_of(checkpoint),
        checkpoint_age_seconds=None if saved is None else time.time() - saved,
        silent_seconds=time.time() - max(activity) if activity else None,
        doing=_text(heartbeat.get("doing")),
        job=task or job,
        failures=sum(event["event"] == "failed" for event in events),
        launches=sum(event["event"] == "started" for event in events),
        last_event=events[-1]["event"] if events else None,
        slowest_rank=_count(compared.get("slowest_rank")),
        slowest_host=_text(compared.get("slowest_host")),
        slowest_ratio=_number(compared.get("slowest_ratio")),
        last_stall=_last_stall(run),
    )


def _count(value: Any) -> int | None:
    """Return `value` if it is an int of 0 or more (below 2**63), else None."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and -1e300 < value < 1e300 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _last_stall(run: Path) -> str | None:
    """Return the line of the newest RUN/watch/stall-TIME/report.json (faults/watchdog.py)."""
    for path in sorted((run / "watch").glob("stall-*/report.json"), reverse=True):
        if (line := read_json_object(path).get("line")) is not None:
            return str(line)
    return None


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return all events in a submission's folder, oldest first."""
    return [event for event in read_json_lines(folder / "events.jsonl") if isinstance(event.get("event"), str)]


def runs_of_event(event: dict[str, Any]) -> list[str]:
    """Return the run directories in a `submitted` event; empty if it has none."""
    runs = event.get("runs")
    return [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []


def job_of_event(event: dict[str, Any]) -> str | None:
    """Return the id of an event's job or array task; None if it has none."""
    job = event.get("job")
    return job if isinstance(job, str) and re.fullmatch(r"\w+", job) else None


def submission_of(run: Path) -> tuple[Path | None, str | None, str | None]:
    """Return folder, job id and this run's job or array task id of its latest submission; three None without one."""
    run = run.absolute()
    for folder in RunDirectory(run).submission_folders:
        for event in reversed(read_events(folder)):
            runs = runs_of_event(event)
            job = job_of_event(event)
            if event["event"] == "submitted" and str(run) in runs and job is not None:
                return folder, job, f"{job}_{runs.index(str(run))}" if len(runs) > 1 else job
    return None, None, None


def _model(settings: dict[str, Any], model: object) -> str | None:
    if not settings.get("size"):
        return None
    return f"{short_name(settings['size'], model)} {settings.get('objective')} {settings.get('phase')}"


def _median(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [value for line in lines[-SPEED_STEPS:] if (value := _number(line.get(key))) is not None]
    return statistics.median(values) if values else None


def _seconds_left(lines: list[dict[str, Any]], settings: dict[str, Any]) -> float | None:
    """Return the seconds left by tokens or by steps, whichever is less; None if both are unknown."""
    if not lines:
        return None
    step, tokens = _count(lines[-1].get("step")), _count(lines[-1].get("tokens"))
    steps, seconds = _count(settings.get("steps")), _median(lines, "step_seconds")
    by_steps = (steps - step) * seconds if steps and seconds and step is not None else None
    total, speed = _count(settings.get("tokens")), _median(lines, "tokens_per_second")
    by_tokens = (total - tokens) / speed if total and speed and tokens is not None else None
    known = [left for left in (by_steps, by_tokens) if left is not None]
    return max(0.0, min(known)) if known else None


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _read_heartbeat(folder: Path | None, task: str | None) -> tuple[dict[str, Any], float | None]:
    """Return the newest heartbeat of a job's attempts and the time of its file; empty and None without one."""
    if folder is None or task is None:
        return {}, None
    try:
        heartbeats = [(path.stat().st_mtime, path) for path in (folder / "attempts").glob(f"{task}.*/{HEARTBEAT}")]
    except OSError:
        return {}, None
    if not heartbeats:
        return {}, None
    written, path = max(heartbeats)
    return read_json_object(path), written


@dataclass(frozen=True)
class QueuedJob:
    """A job, or one task of an array."""

    id: str
    """`12`, or `12_3` for a task of an array."""
    name: str
    state: str
    reason: str
    """SLURM's reason why it waits; `None` (the word) without one."""
    nodes: str
    """SLURM's list of its nodes; empty while it waits."""
    restarts: int
    """Number of its requeues."""
    log: Path | None
    """File of its output; None if SLURM names none."""


def run_slurm(*command: str) -> str | None:
    """Return the output of a SLURM command; None without SLURM, on failure or after SLURM_SECONDS."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def query_jobs(job: str) -> list[QueuedJob]:
    """Return a job, or the tasks of an array; empty if SLURM does not know the job (any more) or does not answer."""
    text = run_slurm("scontrol", "show", "job", "--oneliner", job)
    return [_parse_job(line) for line in (text or "").splitlines() if line.startswith("JobId=")]


def own_jobs() -> list[QueuedJob]:
    """Return the user's waiting and running jobs, with all tasks of their arrays. Raises UserError without SLURM."""
    # %F is the id of a job, or of the array that a task belongs to
    text = run_slurm("squeue", "-h", "-u", getpass.getuser(), "-o", "%F")
    if text is None:
        raise UserError("no squeue answers on this machine; name a run directory")
    return [queued for job in dict.fromkeys(text.split()) for queued in query_jobs(job)]


def _parse_job(line: str) -> QueuedJob:
    fields = dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", line.strip()))
    array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId", "")
    log = fields.get("StdOut")
    return QueuedJob(
        id=f"{array}_{task}" if array and task else fields["JobId"],
        name=fields.get("JobName", ""),
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", "None"),
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        restarts=int(fields.get("Restarts", 0)),
        log=Path(log) if log else None,
    )


def covers(job: str, task: str | None) -> bool:
    """Return whether a job id of SLURM includes `task`: the waiting tasks `12_0-3,7%2` include `12_3`, not `12_4`."""
    if task is None or "_" not in job or "_" not in task:
        return job == task
    (array, indices), (task_array, index) = job.split("_", 1), task.split("_", 1)
    ranges = [part.partition("-") for part in indices.strip("[]").partition("%")[0].split(",")]
    return array == task_array and any(int(first) <= int(index) <= int(last or first) for first, _, last in ranges)
