"""Record the phase of a rank's main thread (for watchdog and supervisor) and its seconds (for the stragglers' hook).

The supervisor of a launch (launch/supervisor) reads a heartbeat file: rank 0 writes its phase and the longest time that
the phase may take, and the supervisor ends a launch that has been silent for longer. All ranks move in step, so one
heartbeat is enough. The ranks themselves notice a hang earlier (watchdog.py). Each rank writes a status to RUN/watch
every `hang_seconds` / 4, and once more when it sees no progress. These statuses show which rank the others wait for.
Nothing is decided by comparing the clocks of two hosts.
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

# shortest time between two heartbeats of steps, to spare a shared file system
BEAT_SECONDS = 2.0
# a phase that is no step (start, first step, evaluation, save) may take this many times hang_seconds
SLOW_FACTOR = 6
# additional time before the supervisor acts, because the ranks' own watchdogs can report more than it can
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
# order in which a rank passes the phases; a phase that is not listed counts as earlier than all
ORDER = (
    *("starting", "first step", "evaluating", BETWEEN_STEPS, "waiting for a save", "saving weights"),
    *("saving a checkpoint", "going on from a save", "writing the report", "stopped", "done"),
    *(DATA, COMPUTE, REDUCE, UPDATE, FIGURES, LATE_UPDATE, "computing a step again"),
)

Item = TypeVar("Item")


@dataclass
class Heartbeat:
    """State of this rank's main thread, for its watchdog and for the supervisor."""

    folder: Path | None = None
    """Folder that the supervisor reads; None without a supervisor and on every rank but 0."""
    hang_seconds: float = 600.0
    """Longest time that a step may take."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures of the latest step: step, tokens, saved_step."""
    doing: str = "starting"
    """Current phase, or part of a step."""
    limit_seconds: float = 0.0
    """Longest time that the phase may take; 0 before the first phase: no limit."""
    ticks: int = 0
    """Number of phases that have ended; the parts of a step do not count as progress."""
    _last: float = 0.0

    def step(self, **figures: Any) -> None:
        """Report that a step or a slow phase has ended, and update `figures`, which later heartbeats repeat."""
        self._move(BETWEEN_STEPS, self.hang_seconds, figures)
        if time.monotonic() - self._last > BEAT_SECONDS:
            self._beat("step")

    def enter(self, doing: str, limit_seconds: float | None = None, **figures: Any) -> None:
        """Enter a phase that may take longer than a step: `limit_seconds`, or `SLOW_FACTOR` * `hang_seconds`."""
        self._move(doing, limit_seconds or self.hang_seconds * SLOW_FACTOR, figures)
        self._beat(doing)

    def set_phase(self, doing: str) -> None:
        """Set the part of a step that this rank is in. This does not restart the step's time limit."""
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
        """Seconds of the last step until its first sum over the ranks, measured on the device if it is a GPU."""
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
        """Record the time before the first sum over all ranks."""
        self.heartbeat.set_phase(REDUCE)
        self._arrived = self.platform.record_event()

    def end(self) -> None:
        """Compute `seconds`, once the device has finished the step."""
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
    """Seconds since it was written, by this host's clock."""

    @property
    def progress(self) -> tuple[int, int]:
        """Return (finished steps, index of the phase in `ORDER`), which is greater for a rank that is further ahead."""
        return self.step, ORDER.index(self.doing) if self.doing in ORDER else -1

    def describe(self) -> str:
        """Return a text such as `reading data of step 12` or `saving a checkpoint after step 11`."""
        in_step = self.progress[1] >= ORDER.index(DATA)
        return f"{self.doing} of step {self.step + 1}" if in_step else f"{self.doing} after step {self.step}"


def status_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's status file."""
    return folder / f"rank_{rank:05d}.json"


def write_rank_status(folder: Path, launch: str, peer: RankInfo, heartbeat: Heartbeat, stalled: bool) -> None:
    """Write this rank's status file.

    Args:
        folder: RUN/watch.
        launch: name of this launch; a reader ignores the files of other launches.
        peer: this rank.
        heartbeat: its heartbeat, from which step and phase are taken.
        stalled: whether it sees no progress.
    """
    doing = {"step": heartbeat.figures.get("step", 0), "doing": heartbeat.doing, "stalled": stalled}
    write_status(status_path(folder, peer.rank), peer.rank, peer.host, pid=peer.pid, launch=launch, **doing)


def read_rank_status(folder: Path, launch: str, rank: int) -> RankStatus | None:
    """Return the latest status of a rank; None if it wrote none in this launch or it cannot be read."""
    try:
        record: dict[str, Any] = json.loads(status_path(folder, rank).read_text(encoding="utf-8"))
        if record["launch"] != launch:
            return None
        # for messages only, because the hosts' clocks may differ
        age = max(0.0, time.time() - float(record["time"]))
        return RankStatus(int(record["step"]), str(record["doing"]), bool(record["stalled"]), age)
    except (OSError, ValueError, KeyError, TypeError):
        return None
