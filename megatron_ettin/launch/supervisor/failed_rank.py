"""Find the rank that failed first: the others usually end only because it did."""

import json
import os
import re
import time
from typing import List, NamedTuple, Optional

# errors of ranks that lost the connection to another rank: consequences, not causes
CONSEQUENCES = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|NCCL|recvValue|timed? ?out|TCPStore|"
    r"no rendezvous with|process group|Socket Timeout|another rank failed"
)
# srun's line about failed tasks: "srun: error: n2: task 3: Killed", "... tasks 0-1: Exited with exit code 1"
# groups: node, first task, how it ended
TASK_LINE = re.compile(r"^srun: error: (\S+): tasks? (\d+)[\d,\-]*: (.+)$")
# ends of tasks that were asked to save and end
REQUESTED_ENDS = ("Terminated", "Exited with exit code 75", "Exited with exit code 143")
# categories of failures that a restart would repeat
FINAL = ("user", "stopped")


class TaskExit(NamedTuple):
    """Failure of a rank."""

    time: float
    """Seconds since the epoch at which it was reported."""
    rank: int
    host: str
    category: str
    """"user": a mistake of the user; "stopped": the run stopped for bad numbers; "error": an exception; "stalled": the
    other ranks waited for it. If only srun reported it: "killed": by a signal; "exit": with an exit status."""
    lines: List[str]
    """Last lines of its error, or srun's report."""

    @property
    def is_consequence(self) -> bool:
        """Return whether the rank failed because another rank did, judged by the last line of its error."""
        return self.category == "error" and any(CONSEQUENCES.search(line) for line in self.lines[-1:])

    def describe(self) -> str:
        """Return the text about this failure for the end of the job's log."""
        where = "rank {} on {}".format(self.rank, self.host)
        if self.category == "stalled":
            # the watchdogs' line names the rank already
            return "\n".join(["--- the ranks' watchdogs ended it:"] + self.lines)
        if self.category == "killed":
            return "--- {} was killed ({})".format(where, self.lines[0])
        return "\n".join(["--- {} failed first; its last lines:".format(where)] + self.lines)


def from_srun(line: str) -> Optional[TaskExit]:
    """Parse srun's line about a failed task; None for other lines and for tasks that were asked to end."""
    match = TASK_LINE.match(line.rstrip())
    if match is None or match.group(3).startswith(REQUESTED_ENDS):
        return None
    by_signal = not match.group(3).startswith("Exited with exit code")
    lines = ["srun: {}".format(match.group(3))]
    return TaskExit(time.time(), int(match.group(2)), match.group(1), "killed" if by_signal else "exit", lines)


def from_files(folder: str) -> List[TaskExit]:
    """Return the failure reports that ranks wrote to an attempt's folder (parallel/failure_report.py)."""
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
            # a report may be torn if the node went down
            continue
    return reports


def stall_line(folder: str) -> str:
    """Return the watchdogs' line that names the rank that the others waited for; empty without a stall."""
    lines = [report.lines[0] for report in from_files(folder) if report.category == "stalled" and report.lines]
    return lines[0] if lines else ""


def first_failure(folder: str, srun_exits: List[TaskExit]) -> Optional[TaskExit]:
    """Return the failure that most likely caused the others; None without failures.

    Args:
        folder: the attempt's folder with the ranks' reports.
        srun_exits: srun's reports of tasks; one counts only if its rank left no report.
    """
    reports = from_files(folder)
    reported = {report.rank for report in reports}
    everyone = reports + [task for task in srun_exits if task.rank not in reported]
    causes = [task for task in everyone if not task.is_consequence]
    killed = [task for task in causes if task.category == "killed"]
    # order by category before time, because srun reports a task later than the ranks write their own reports
    chosen = [task for task in causes if task.category in (*FINAL, "error", "stalled")] or killed or causes or everyone
    return min(chosen, key=lambda task: task.time) if chosen else None
