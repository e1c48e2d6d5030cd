"""What SLURM says of jobs."""

from __future__ import annotations

import getpass
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.base.errors import UserError

ASK_SECONDS = 30.0


@dataclass(frozen=True)
class Queued:
    """A job, or a task of an array (`id` is then `12_3`). `reason`: why it waits. `log`: where its output goes."""

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    restarts: int
    log: Path | None


def ask(*command: str) -> str | None:
    """What a command of SLURM's prints; None where there is no SLURM or it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def shown(job: str) -> list[Queued]:
    """A job, or the tasks of an array, as long as SLURM remembers them."""
    text = ask("scontrol", "show", "job", "--oneliner", job)
    return [_parsed(line) for line in (text or "").splitlines() if line.startswith("JobId=")]


def own_jobs() -> list[Queued]:
    """The user's jobs that wait or run; of an array that does, all tasks. Raises UserError without SLURM."""
    text = ask("squeue", "-h", "-u", getpass.getuser(), "-o", "%F")  # of an array's tasks the array
    if text is None:
        raise UserError("no squeue answers on this machine; name a run directory")
    return [queued for job in dict.fromkeys(text.split()) for queued in shown(job)]


def _parsed(line: str) -> Queued:
    fields = dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", line.strip()))
    array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId", "")
    job = f"{array}_{task}" if array and task else fields["JobId"]
    log = fields.get("StdOut")
    return Queued(
        id=job,
        name=fields.get("JobName", ""),
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", "None"),
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        restarts=int(fields.get("Restarts", 0)),
        log=Path(log) if log else None,
    )


def covers(job: str, task: str | None) -> bool:
    """Whether a job's id is, or stands for, the task: `12_0-3,7%2` for the tasks of an array that wait together."""
    if task is None or "_" not in job or "_" not in task:
        return job == task
    (array, indices), (wanted, index) = job.split("_", 1), task.split("_", 1)
    indices = indices.strip("[]")
    ranges = [part.partition("-") for part in indices.partition("%")[0].split(",")]
    return array == wanted and any(int(first) <= int(index) <= int(last or first) for first, _, last in ranges)
