"""Who did not arrive: of all ranks of a launch, those of which nothing is heard, or those that are behind the others.

Each rank leaves a small file of its own in RUN/watch (`write_sign`), seldom while all goes well and once more when it
sees that nothing moves. A file says by its counter whether its rank is alive; clocks of two hosts are not compared."""

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
TOLD_RANKS = 3
DATA, COMPUTE, REDUCE, UPDATE, FIGURES, LATE_UPDATE = (
    "reading data",
    "forward and backward",
    "the gradient sum",
    "the update",
    "the sum of the step's figures",
    "the update of weights",
)
# in which a rank passes them; what is not among them comes before all
ORDER = (
    *("starting", "first step", "evaluating", BETWEEN_STEPS, "waiting for a save", "saving weights"),
    *("saving a checkpoint", "going on from a save", DATA, COMPUTE, REDUCE, UPDATE, FIGURES, LATE_UPDATE),
)


@dataclass(frozen=True)
class RankInfo:
    """A rank of this launch."""

    rank: int
    host: str
    pid: int

    @classmethod
    def here(cls, rank: int) -> RankInfo:
        return cls(rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True)
class RankStatus:
    """What a rank said last. `step`: steps that it has done; `doing`: where it is after them; `stalled`: that it sees
    no progress."""

    step: int
    doing: str
    stalled: bool
    age_seconds: float

    @property
    def place(self) -> tuple[int, int]:
        return self.step, ORDER.index(self.doing) if self.doing in ORDER else -1

    def told(self) -> str:
        """`reading data of step 12`, `saving a checkpoint after step 11`."""
        in_step = self.place[1] >= ORDER.index(DATA)
        return f"{self.doing} of step {self.step + 1}" if in_step else f"{self.doing} after step {self.step}"


@dataclass(frozen=True)
class HangReport:
    """`line`: for the end of the log; `culprit`: the first rank that it names, None where no rank is behind."""

    line: str
    culprit: RankInfo | None


def status_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def write_status(folder: Path, launch: str, peer: RankInfo, heartbeat: Heartbeat, count: int, stalled: bool) -> None:
    """Say that this rank is alive and what it does. `launch`: which of the run's launches; `count`: of the signs."""
    record = {
        **{"launch": launch, "count": count, "rank": peer.rank, "host": peer.host, "pid": peer.pid},
        **{"step": heartbeat.figures.get("step", 0), "doing": heartbeat.doing, "stalled": stalled, "time": time.time()},
    }
    write_record(status_path(folder, peer.rank), record)


def read_status(folder: Path, launch: str, rank: int) -> RankStatus | None:
    """The rank's last one; None where it left none in this launch."""
    try:
        found: dict[str, Any] = json.loads(status_path(folder, rank).read_text(encoding="utf-8"))
        if found["launch"] != launch:
            return None
        age = max(0.0, time.time() - float(found["time"]))  # to be told, not to decide by
        return RankStatus(int(found["step"]), str(found["doing"]), bool(found["stalled"]), age)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hang_report(peers: Sequence[RankInfo], signs: Mapping[int, RankStatus]) -> HangReport:
    """Who holds the others up. `signs`: the last ones; ranks whose sign is not `stalled` gave no answer."""
    answered = {rank: sign for rank, sign in signs.items() if sign.stalled}
    silent = [peer for peer in peers if peer.rank not in answered]
    if silent:
        told = [_silence(peer, signs.get(peer.rank)) for peer in silent[:TOLD_RANKS]]
        more = f" and {len(silent) - TOLD_RANKS} more" if len(silent) > TOLD_RANKS else ""
        return HangReport(", ".join(told) + more + _others(list(answered.values())), silent[0])
    last = min(sign.place for sign in answered.values())
    behind = [peer for peer in peers if answered[peer.rank].place == last]
    others = [sign for sign in answered.values() if sign.place != last]
    where = answered[behind[0].rank].told()
    if not others:
        who = str(behind[0]) if len(peers) == 1 else f"all {len(peers)} ranks"
        verb = "is" if len(peers) == 1 else "are"
        return HangReport(f"{who} {verb} in {where}", peers[0] if len(peers) == 1 else None)
    told = [str(peer) for peer in behind[:TOLD_RANKS]]
    more = f" and {len(behind) - TOLD_RANKS} more" if len(behind) > TOLD_RANKS else ""
    verb = "is" if len(behind) == 1 else "are"
    return HangReport(f"{', '.join(told)}{more} {verb} still in {where}{_others(others)}", behind[0])


def _silence(peer: RankInfo, sign: RankStatus | None) -> str:
    if sign is None:
        return f"{peer} has not been heard of"
    return f"{peer} has not been heard of for {sign.age_seconds:.0f} s (last {sign.told()})"


def _others(signs: Sequence[RankStatus]) -> str:
    """What the most of them wait in."""
    if not signs:
        return ""
    (where, count), *_ = Counter(sign.told() for sign in signs).most_common(1)
    return f"; {'the others wait' if count == len(signs) else f'{count} others wait'} in {where}"
