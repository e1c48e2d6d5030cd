"""Find the rank that failed first: of many ranks that ended, one ended by itself and the others because of it."""

import json
import os
import re
import time
from typing import List, NamedTuple, Optional

# errors of ranks that lost another one: consequences, not causes
CONSEQUENCES = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|NCCL|recvValue|timed? ?out|TCPStore|"
    r"no rendezvous with|process group|Socket Timeout|another rank failed"
)
# srun's line about a task that ended badly: "srun: error: n2: task 3: Killed", "... tasks 0-1: Exited with exit code 1"
# the first of several tasks is kept
TASK_LINE = re.compile(r"^srun: error: (\S+): tasks? (\d+)[\d,\-]*: (.+)$")
REQUESTED_ENDS = ("Terminated", "Exited with exit code 75", "Exited with exit code 143")
# failures that a restart would repeat
FINAL = ("user", "stopped")


class TaskExit(NamedTuple):
    """A rank that ended badly."""

    time: float
    """When, in seconds of the epoch."""
    rank: int
    host: str
    category: str
    """"user": a mistake; "stopped": bad numbers; "error"; "stalled": all others waited for it; "killed": by a signal,
    without an error of its own; "exit": with a status, without an error of its own."""
    lines: List[str]
    """The last lines of its error."""

    @property
    def is_consequence(self) -> bool:
        """Return whether it ended because another one did."""
        return self.category == "error" and any(CONSEQUENCES.search(line) for line in self.lines[-1:])

    def describe(self) -> str:
        """Return the lines that end the job's log."""
        where = "rank {} on {}".format(self.rank, self.host)
        if self.category == "stalled":
            # its line names the rank already
            return "\n".join(["--- the ranks' watchdogs ended it:"] + self.lines)
        if self.category == "killed":
            return "--- {} was killed ({})".format(where, self.lines[0])
        return "\n".join(["--- {} failed first; its last lines:".format(where)] + self.lines)


def from_srun(line: str) -> Optional[TaskExit]:
    """Parse a line of srun about a task; None for its other lines and for tasks that were asked to end."""
    match = TASK_LINE.match(line.rstrip())
    if match is None or match.group(3).startswith(REQUESTED_ENDS):
        return None
    by_signal = not match.group(3).startswith("Exited with exit code")
    lines = ["srun: {}".format(match.group(3))]
    return TaskExit(time.time(), int(match.group(2)), match.group(1), "killed" if by_signal else "exit", lines)


def from_files(folder: str) -> List[TaskExit]:
    """Read the failure reports that the ranks themselves left (parallel/failure_report.py)."""
    reports = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if not re.match(r"rank_\d+\.json$", name):
            continue
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                record = json.load(file)
            lines = [str(line) for line in record["lines"]]
            reports.append(TaskExit(record["time"], record["rank"], record["host"], record["kind"], lines))
        except (OSError, ValueError, KeyError, TypeError):
            # written while the node went down
            continue
    return reports


def stall_line(folder: str) -> str:
    """Return the watchdogs' line that names the rank they waited for; empty without one."""
    lines = [report.lines[0] for report in from_files(folder) if report.category == "stalled" and report.lines]
    return lines[0] if lines else ""


def first_failure(folder: str, srun_exits: List[TaskExit]) -> Optional[TaskExit]:
    """Return the earliest failure that no other one caused; the earliest of all if each is a consequence."""
    reports = from_files(folder)
    reported = {report.rank for report in reports}
    everyone = reports + [task for task in srun_exits if task.rank not in reported]
    causes = [task for task in everyone if not task.is_consequence]
    killed = [task for task in causes if task.category == "killed"]
    # srun reports a killed rank after the others have already written what they saw of it
    chosen = [task for task in causes if task.category in (*FINAL, "error", "stalled")] or killed or causes or everyone
    return min(chosen, key=lambda task: task.time) if chosen else None
