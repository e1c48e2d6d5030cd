"""Name the ranks that the others wait for in a hang: those that are silent, or those that are behind.

Each rank writes a small status file in RUN/watch (`write_status`), seldom while all goes well and once more when it
sees no progress. Clocks of two hosts are not compared to decide anything.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.parallel.failure_report import BETWEEN_STEPS, Heartbeat, write_record

FOLDER = "watch"
LISTED_RANKS = 3
DATA, COMPUTE, REDUCE, UPDATE, FIGURES, LATE_UPDATE = (
    "reading data",
    "forward and backward",
    "the gradient sum",
    "the update",
    "the sum of the step's figures",
    "the update of weights",
)
# the order in which a rank passes the phases; any other phase comes before all
ORDER = (
    *("starting", "first step", "evaluating", BETWEEN_STEPS, "waiting for a save", "saving weights"),
    *("saving a checkpoint", "going on from a save", DATA, COMPUTE, REDUCE, UPDATE, FIGURES, LATE_UPDATE),
)


@dataclass(frozen=True)
class RankInfo:
    """Rank, host and process id of one rank of a launch."""

    rank: int
    host: str
    pid: int

    @classmethod
    def here(cls, rank: int) -> RankInfo:
        """Return the info of this process."""
        return cls(rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True)
class RankStatus:
    """The latest status of a rank."""

    step: int
    """Number of finished steps."""
    doing: str
    """Phase, or part of the next step."""
    stalled: bool
    """Whether the rank sees no progress."""
    age_seconds: float

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done and order of the phase, which compare as ranks are ahead of each other."""
        return self.step, ORDER.index(self.doing) if self.doing in ORDER else -1

    def describe(self) -> str:
        """Return `reading data of step 12` or `saving a checkpoint after step 11`."""
        in_step = self.progress[1] >= ORDER.index(DATA)
        return f"{self.doing} of step {self.step + 1}" if in_step else f"{self.doing} after step {self.step}"


@dataclass(frozen=True)
class HangReport:
    """Report that names the rank which the others wait for."""

    line: str
    """Message for the end of the log."""
    culprit: RankInfo | None
    """The first rank that `line` names; None where no rank is behind."""


def status_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's status file."""
    return folder / f"rank_{rank:05d}.json"


def write_status(folder: Path, launch: str, peer: RankInfo, heartbeat: Heartbeat, count: int, stalled: bool) -> None:
    """Write that this rank is alive and what it does.

    Args:
        folder: RUN/watch.
        launch: name of the run's launch; files of another one are ignored.
        peer: this rank.
        heartbeat: what its main thread does.
        count: number of statuses that it has written.
        stalled: whether it sees no progress.
    """
    record = {
        **{"launch": launch, "count": count, "rank": peer.rank, "host": peer.host, "pid": peer.pid},
        **{"step": heartbeat.figures.get("step", 0), "doing": heartbeat.doing, "stalled": stalled, "time": time.time()},
    }
    write_record(status_path(folder, peer.rank), record)


def read_status(folder: Path, launch: str, rank: int) -> RankStatus | None:
    """Return the latest status of a rank; None where it wrote none in this launch."""
    try:
        found: dict[str, Any] = json.loads(status_path(folder, rank).read_text(encoding="utf-8"))
        if found["launch"] != launch:
            return None
        # to be shown, not to decide by
        age = max(0.0, time.time() - float(found["time"]))
        return RankStatus(int(found["step"]), str(found["doing"]), bool(found["stalled"]), age)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hang_report(peers: Sequence[RankInfo], statuses: Mapping[int, RankStatus]) -> HangReport:
    """Find the ranks that hold the others up.

    Args:
        peers: all ranks.
        statuses: their latest statuses; a rank whose status is not `stalled` gave no answer.
    """
    answered = {rank: status for rank, status in statuses.items() if status.stalled}
    silent = [peer for peer in peers if peer.rank not in answered]
    if silent:
        listed = [_silence(peer, statuses.get(peer.rank)) for peer in silent[:LISTED_RANKS]]
        more = f" and {len(silent) - LISTED_RANKS} more" if len(silent) > LISTED_RANKS else ""
        return HangReport(", ".join(listed) + more + _others(list(answered.values())), silent[0])
    last = min(status.progress for status in answered.values())
    behind = [peer for peer in peers if answered[peer.rank].progress == last]
    others = [status for status in answered.values() if status.progress != last]
    where = answered[behind[0].rank].describe()
    if not others:
        who = str(behind[0]) if len(peers) == 1 else f"all {len(peers)} ranks"
        verb = "is" if len(peers) == 1 else "are"
        return HangReport(f"{who} {verb} in {where}", peers[0] if len(peers) == 1 else None)
    listed = [str(peer) for peer in behind[:LISTED_RANKS]]
    more = f" and {len(behind) - LISTED_RANKS} more" if len(behind) > LISTED_RANKS else ""
    verb = "is" if len(behind) == 1 else "are"
    return HangReport(f"{', '.join(listed)}{more} {verb} still in {where}{_others(others)}", behind[0])


def _silence(peer: RankInfo, status: RankStatus | None) -> str:
    if status is None:
        return f"{peer} has not been heard of"
    return f"{peer} has not been heard of for {status.age_seconds:.0f} s (last {status.describe()})"


def _others(statuses: Sequence[RankStatus]) -> str:
    """Return what most of the other ranks wait in, for the end of the line."""
    if not statuses:
        return ""
    (where, count), *_ = Counter(status.describe() for status in statuses).most_common(1)
    return f"; {'the others wait' if count == len(statuses) else f'{count} others wait'} in {where}"
