"""Who was first: of many ranks that ended, one ended by itself and the others because of it."""

import json
import os
import re
import time
from typing import List, NamedTuple, Optional

# what ranks say when another one has gone: consequences, not causes
CONSEQUENCES = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|NCCL|recvValue|timed? ?out|TCPStore|"
    r"no rendezvous with|process group|Socket Timeout|another rank failed"
)
# srun's word for a task that ended badly: "srun: error: n2: task 3: Killed", "... tasks 0-1: Exited with exit code 1"
TASK_LINE = re.compile(r"^srun: error: (\S+): tasks? ([\d,\-]+): (.+)$")
ASKED_TO_END = ("Terminated", "Exited with exit code 75", "Exited with exit code 143")
FINAL = ("user", "stopped")  # what would end the same way again


class TaskExit(NamedTuple):
    """A rank that ended badly: when (seconds of the epoch), and the last lines of its error."""

    time: float
    rank: int
    host: str
    # "user": a mistake; "stopped": numbers to look at; "error"; "stalled": all others waited for it; "killed": by a
    # signal, without a word
    kind: str
    lines: List[str]

    @property
    def is_consequence(self) -> bool:
        """Whether it ended because another one did."""
        return self.kind == "error" and any(CONSEQUENCES.search(line) for line in self.lines[-1:])

    def told(self) -> str:
        """For the end of the log."""
        where = "rank {} on {}".format(self.rank, self.host)
        if self.kind == "stalled":  # its line names it, and others with it
            return "\n".join(["--- the ranks' watchdogs ended it:"] + self.lines)
        if self.kind == "killed":
            return "--- {} was killed ({})".format(where, self.lines[0])
        return "\n".join(["--- {} ended first; the last it said:".format(where)] + self.lines)


def ranks_of(text: str) -> List[int]:
    """`0,2-4` -> [0, 2, 3, 4]"""
    found: List[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def from_srun(line: str) -> Optional[TaskExit]:
    """What srun said of a task now; None for its other lines and for tasks that others made end."""
    match = TASK_LINE.match(line.rstrip())
    if match is None or match.group(3).startswith(ASKED_TO_END):
        return None
    by_signal = not match.group(3).startswith("Exited with exit code")
    rank = ranks_of(match.group(2))[0]
    lines = ["srun: {}".format(match.group(3))]
    return TaskExit(time.time(), rank, match.group(1), "killed" if by_signal else "exit", lines)


def from_files(folder: str) -> List[TaskExit]:
    """What the ranks left themselves (parallel/failure_report.py's record_failure)."""
    found = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if not re.match(r"rank_\d+\.json$", name):
            continue
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                record = json.load(file)
            lines = [str(line) for line in record["lines"]]
            found.append(TaskExit(record["time"], record["rank"], record["host"], record["kind"], lines))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # written while the node went down
    return found


def stall(folder: str) -> str:
    """The line of the ranks' watchdogs, who say whom they waited for; empty where they said nothing."""
    lines = [ended.lines[0] for ended in from_files(folder) if ended.kind == "stalled" and ended.lines]
    return lines[0] if lines else ""


def first(folder: str, said_by_srun: List[TaskExit]) -> Optional[TaskExit]:
    """The culprit: the earliest that is no consequence of another; of nothing but consequences the earliest."""
    own = from_files(folder)
    spoke = {ended.rank for ended in own}
    everyone = own + [ended for ended in said_by_srun if ended.rank not in spoke]
    causes = [ended for ended in everyone if not ended.is_consequence]
    killed = [ended for ended in causes if ended.kind == "killed"]
    # a rank that was killed is told of by srun after the others have already written what they saw of it
    chosen = [ended for ended in causes if ended.kind in (*FINAL, "error", "stalled")] or killed or causes or everyone
    return min(chosen, key=lambda ended: ended.time) if chosen else None
