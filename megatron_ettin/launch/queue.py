"""Ask SLURM about jobs."""

from __future__ import annotations

import getpass
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.errors import UserError

SLURM_SECONDS = 30.0


@dataclass(frozen=True)
class QueuedJob:
    """A job, or one task of an array."""

    id: str
    """`12`, or `12_3` for a task of an array."""
    name: str
    state: str
    reason: str
    """Reason why it waits."""
    nodes: str
    restarts: int
    log: Path | None
    """File that takes its output."""


def run_slurm(*command: str) -> str | None:
    """Return the output of a SLURM command; None without SLURM or when the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def query_jobs(job: str) -> list[QueuedJob]:
    """Return a job, or the tasks of an array, as long as SLURM remembers them."""
    text = run_slurm("scontrol", "show", "job", "--oneliner", job)
    return [_parse_job(line) for line in (text or "").splitlines() if line.startswith("JobId=")]


def own_jobs() -> list[QueuedJob]:
    """Return the user's jobs that wait or run, with all tasks of their arrays. Raises UserError without SLURM."""
    # %F is the array of an array's task
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
    """Return whether a job's id includes the task: `12_0-3,7%2` stands for the tasks of an array that still wait."""
    if task is None or "_" not in job or "_" not in task:
        return job == task
    (array, indices), (task_array, index) = job.split("_", 1), task.split("_", 1)
    ranges = [part.partition("-") for part in indices.strip("[]").partition("%")[0].split(",")]
    return array == task_array and any(int(first) <= int(index) <= int(last or first) for first, _, last in ranges)
