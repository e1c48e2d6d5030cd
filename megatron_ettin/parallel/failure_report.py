"""Write the files that a launch's supervisor (launch/supervisor) reads: a heartbeat, and how a rank failed.

Both lie in the folder that ETTIN_ATTEMPT_DIR names; without it nothing is written. The ranks themselves notice a hang
(faults/watchdog.py). The supervisor notices it too, in case they cannot report it: rank 0 writes what it does and how
long that may take at most, and the supervisor ends a launch that has been silent for longer. All ranks move in step, so
one heartbeat is enough.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_exception
from megatron_ettin.parallel.env import rank_of_environment

FOLDER_VARIABLE = "ETTIN_ATTEMPT_DIR"
HEARTBEAT = "heartbeat.json"
# steps may be shorter; a shared file system need not see each
BEAT_SECONDS = 2.0
# everything but a step (start, first step, evaluation, save) may take so many times hang_seconds
SLOW_FACTOR = 6
# time that the supervisor leaves the ranks' own watchdogs, which can report more than it can
WATCHDOG_SECONDS = 30.0
BETWEEN_STEPS = "between two steps"
# last lines of an error that a record keeps
KEPT_LINES = 12


def report_folder() -> Path | None:
    """Return the folder that this launch's supervisor reads; None without a supervisor."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


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
        write_record(
            self.folder / HEARTBEAT, {"time": time.time(), "doing": doing, "limit_seconds": limit, **self.figures}
        )


def record_failure(error: BaseException, category: str = "error") -> None:
    """Write how this rank failed to `rank_00003.json`: host, time and the last lines of the error.

    Args:
        error: what ended the rank.
        category: "user" for a mistake and "stopped" for numbers, which no restart mends; otherwise "error".
    """
    folder = report_folder()
    if folder is None:
        return
    lines = traceback.format_exception(error) if category == "error" else [str(error)]
    last = "".join(lines).rstrip().splitlines()[-KEPT_LINES:]
    rank = rank_of_environment()
    record = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "kind": category, "lines": last}
    _record_once(folder, rank, record)


def record_stall(rank: int, host: str, line: str) -> None:
    """Write that all ranks wait for this one."""
    folder = report_folder()
    if folder is not None:
        record = {"rank": rank, "host": host, "time": time.time(), "kind": "stalled", "lines": [line]}
        _record_once(folder, rank, record)


def _record_once(folder: Path, rank: int, record: dict[str, Any]) -> None:
    path = folder / f"rank_{rank:05d}.json"
    # the first failure caused the later ones
    if not path.exists():
        write_record(path, record)


class PeerFailure(RuntimeError):
    """Another rank failed. Raised on the ranks that did not, so that the supervisor finds the one that did."""


def raise_on_all(error: Exception, ranks: Collection[int], own: int) -> NoReturn:
    """Raise `error` on the ranks that it names, and PeerFailure on the others."""
    if own in ranks:
        raise error
    raise PeerFailure(f"another rank failed: {error}") from None


def end_now(error: BaseException) -> NoReturn:
    """Record and log the error and end this process, whatever it still holds."""
    record_failure(error)
    log_exception(error)
    os._exit(1)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace a file by a JSON record. Never raises: a heartbeat that a full disk refuses must not end a run."""
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(record) + "\n", durable=False)


@functools.cache
def exit_with_parent() -> None:
    """End this process when the one that started it has gone.

    A rank whose slurmstepd or torchrun agent was killed is seen by nobody, and would go on holding its GPU. A command
    calls this first, before its large imports: a launcher that is killed meanwhile would leave another parent behind.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="exit with parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    record_failure(RuntimeError("the process that started this rank (slurmstepd or torchrun's agent) is gone"))
    os._exit(1)
