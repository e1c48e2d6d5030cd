"""What the ranks of a supervised launch leave for their supervisor (launch/supervisor): that the run ticks, and how a
rank failed. Both are files in the folder that ETTIN_ATTEMPT_DIR names; without it nothing is written.

A hang is seen by the ranks themselves (faults/watchdog.py). From outside it is seen as well, should they be unable to
tell: rank 0 says what it does and how long that may take at most (all ranks move in step, so one is enough, however
many there are), and the supervisor ends what has said nothing for longer."""

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
BEAT_SECONDS = 2.0  # steps may be shorter; a shared file system need not see each
SLOW_FACTOR = 6  # what is no step (start, first step, evaluation, save) may take so many times hang_seconds
WATCHDOG_SECONDS = 30.0  # that the supervisor leaves the ranks' own watchdogs to tell more than it can
BETWEEN_STEPS = "between two steps"
TOLD_LINES = 12  # of an error, its last ones


def report_folder() -> Path | None:
    """Where this launch's supervisor reads; None without one."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


@dataclass
class Heartbeat:
    """What the main thread of this rank does, for its watchdog (faults/watchdog.py), and on rank 0, where `folder` is
    given, the heartbeat that the supervisor reads. `hang_seconds`: the longest that a step may take."""

    folder: Path | None = None
    hang_seconds: float = 600.0
    figures: dict[str, Any] = field(default_factory=dict)  # of the latest step: step, tokens, saved_step
    doing: str = "starting"  # or where in a step
    limit_seconds: float = 0.0  # for what it does now, by the watchdog
    ticks: int = 0  # how often something ended and something else began: progress, unlike the moments of a step
    _last: float = 0.0

    def step(self, **figures: Any) -> None:
        """A step is done, or what was slow; `figures` are kept for the beats to come."""
        self._move(BETWEEN_STEPS, self.hang_seconds, figures)
        if time.monotonic() - self._last > BEAT_SECONDS:
            self._beat("step")

    def enter(self, doing: str, limit_seconds: float | None = None, **figures: Any) -> None:
        """Something begins that may take longer than a step."""
        self._move(doing, limit_seconds or self.hang_seconds * SLOW_FACTOR, figures)
        self._beat(doing)

    def set_phase(self, moment: str) -> None:
        """Where in a step this rank is; the step's time goes on."""
        self.doing = moment

    def _move(self, doing: str, limit_seconds: float, figures: dict[str, Any]) -> None:
        self.figures = self.figures | figures  # a new one: the watchdog's thread may be reading
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


def record_failure(error: BaseException, kind: str = "error") -> None:
    """Leave how this rank failed: `rank_00003.json` with host, time and the last lines of the error. `kind`: "user" for
    a mistake and "stopped" for numbers that no restart mends, "error" else."""
    folder = report_folder()
    if folder is None:
        return
    lines = traceback.format_exception(error) if kind == "error" else [str(error)]
    told = "".join(lines).rstrip().splitlines()[-TOLD_LINES:]
    rank = rank_of_environment()
    record = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "kind": kind, "lines": told}
    _record_once(folder, rank, record)


def record_stall(rank: int, host: str, line: str) -> None:
    """Leave that all ranks wait for this one, in the words of `line`."""
    folder = report_folder()
    if folder is not None:
        record = {"rank": rank, "host": host, "time": time.time(), "kind": "stalled", "lines": [line]}
        _record_once(folder, rank, record)


def _record_once(folder: Path, rank: int, record: dict[str, Any]) -> None:
    path = folder / f"rank_{rank:05d}.json"
    if not path.exists():  # what came first is the cause of what came after
        write_record(path, record)


class PeerFailure(RuntimeError):
    """What the ranks raise that are not to blame, so that the supervisor finds the one that is."""


def raise_on_all(error: Exception, ranks: Collection[int], own: int) -> NoReturn:
    """Raise `error` on the ranks that it names, and on the others that they end because of it."""
    if own in ranks:
        raise error
    raise PeerFailure(f"another rank failed: {error}") from None


def end_now(error: BaseException) -> NoReturn:
    """Tell of the error and end this process, whatever it still holds."""
    record_failure(error)
    log_exception(error)
    os._exit(1)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the file. A heartbeat that cannot be written (a full disk) is no reason for a run to end."""
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(record) + "\n", durable=False)


@functools.cache
def exit_with_parent() -> None:
    """End this process when the one that started it has gone.

    A rank whose slurmstepd or torchrun agent was killed is seen by nobody, and would go on holding its GPU. A command
    calls this first, before its large imports: a launcher that is killed meanwhile would leave another parent behind.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="end with launcher", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    record_failure(RuntimeError("the process that started this rank (slurmstepd or torchrun's agent) is gone"))
    os._exit(1)
