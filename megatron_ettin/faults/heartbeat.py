"""Hold what a rank's main thread does: its phase for the watchdog and the supervisor, its seconds for the stragglers.

The supervisor of a launch (launch/supervisor) reads a heartbeat: rank 0 writes what it does and how long that may take
at most, and a launch that has been silent for longer is ended. All ranks move in step, so one heartbeat is enough. The
ranks themselves notice a hang earlier (watchdog.py), by the statuses in RUN/watch: each rank writes one, seldom while
all goes well and once more when it sees no progress. Clocks of two hosts are not compared to decide anything.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_ettin.parallel.failure_report import HEARTBEAT, write_status
from megatron_ettin.platform import Platform

# steps may be shorter; a shared file system need not see each
BEAT_SECONDS = 2.0
# everything but a step (start, first step, evaluation, save) may take so many times hang_seconds
SLOW_FACTOR = 6
# time that the supervisor leaves the ranks' own watchdogs, which can report more than it can
WATCHDOG_SECONDS = 30.0
BETWEEN_STEPS = "between two steps"
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

Item = TypeVar("Item")


@dataclass
class Heartbeat:
    """State of this rank's main thread, for its watchdog and for the supervisor."""

    folder: Path | None = None
    """Folder of the supervisor; None on every rank but 0."""
    hang_seconds: float = 600.0
    """The longest that a step may take."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures of the latest step: step, tokens, saved_step."""
    doing: str = "starting"
    """The phase, or the part of a step."""
    limit_seconds: float = 0.0
    """Longest time that the phase may take."""
    ticks: int = 0
    """Number of phases that have ended; the parts of a step do not count as progress."""
    _last: float = 0.0

    def step(self, **figures: Any) -> None:
        """Report that a step or a slow phase has ended; `figures` are kept for later beats."""
        self._move(BETWEEN_STEPS, self.hang_seconds, figures)
        if time.monotonic() - self._last > BEAT_SECONDS:
            self._beat("step")

    def enter(self, doing: str, limit_seconds: float | None = None, **figures: Any) -> None:
        """Enter a phase that may take longer than a step."""
        self._move(doing, limit_seconds or self.hang_seconds * SLOW_FACTOR, figures)
        self._beat(doing)

    def set_phase(self, doing: str) -> None:
        """Set which part of a step this rank is in; the step's time goes on."""
        self.doing = doing

    def _move(self, doing: str, limit_seconds: float, figures: dict[str, Any]) -> None:
        # a new dict, because the watchdog's thread may be reading
        self.figures = self.figures | figures
        self.doing, self.limit_seconds = doing, limit_seconds
        self.ticks += 1

    def _beat(self, doing: str) -> None:
        if self.folder is None:
            return
        self._last = time.monotonic()
        limit = self.limit_seconds + WATCHDOG_SECONDS
        write_status(self.folder / HEARTBEAT, 0, doing=doing, limit_seconds=limit, **self.figures)


class StepTimer:
    """Timer that `train_step` calls; the watchdog (through the heartbeat) and the stragglers' hook read it."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.heartbeat = Heartbeat()
        self.seconds = 0.0
        """Seconds of the last step until its first sum; on a GPU of the device's time."""
        self._began: Any = None
        self._arrived: Any = None

    def begin(self) -> None:
        """Start the step."""
        self._began, self._arrived = self.platform.record_event(), None

    def reading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the micro-batches, and report whether the rank waits for data or computes."""
        self.heartbeat.set_phase(DATA)
        for batch in batches:
            self.heartbeat.set_phase(COMPUTE)
            yield batch
            self.heartbeat.set_phase(DATA)

    def arrive(self) -> None:
        """Mark the first sum over all ranks."""
        self.heartbeat.set_phase(REDUCE)
        self._arrived = self.platform.record_event()

    def end(self) -> None:
        """End the step, once the device has finished it."""
        if self._arrived is not None:
            self.seconds = self.platform.elapsed_seconds(self._began, self._arrived)


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
    """True if the rank sees no progress."""
    age_seconds: float

    @property
    def progress(self) -> tuple[int, int]:
        """Return the steps done and the order of the phase, which compare as ranks are ahead of each other."""
        return self.step, ORDER.index(self.doing) if self.doing in ORDER else -1

    def describe(self) -> str:
        """Return `reading data of step 12` or `saving a checkpoint after step 11`."""
        in_step = self.progress[1] >= ORDER.index(DATA)
        return f"{self.doing} of step {self.step + 1}" if in_step else f"{self.doing} after step {self.step}"


def status_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's status file."""
    return folder / f"rank_{rank:05d}.json"


def write_rank_status(folder: Path, launch: str, peer: RankInfo, heartbeat: Heartbeat, stalled: bool) -> None:
    """Write that this rank is alive and what it does.

    Args:
        folder: RUN/watch.
        launch: name of the run's launch; files of another one are ignored.
        peer: this rank.
        heartbeat: what its main thread does.
        stalled: whether it sees no progress.
    """
    doing = {"step": heartbeat.figures.get("step", 0), "doing": heartbeat.doing, "stalled": stalled}
    write_status(status_path(folder, peer.rank), peer.rank, peer.host, pid=peer.pid, launch=launch, **doing)


def read_rank_status(folder: Path, launch: str, rank: int) -> RankStatus | None:
    """Return the latest status of a rank; None where it wrote none in this launch."""
    try:
        record: dict[str, Any] = json.loads(status_path(folder, rank).read_text(encoding="utf-8"))
        if record["launch"] != launch:
            return None
        # to be shown, not to decide by
        age = max(0.0, time.time() - float(record["time"]))
        return RankStatus(int(record["step"]), str(record["doing"]), bool(record["stalled"]), age)
    except (OSError, ValueError, KeyError, TypeError):
        return None
