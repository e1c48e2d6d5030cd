"""A thread of every rank that sees when the main thread no longer ticks: it leaves every thread's Python stack and
torch's flight recorder in RUN/watch/stall-TIME, one rank says whom the others wait for, and all end with 75.

All ranks move in step, so all of them see a stall within a moment of each other. One that does not answer then is
stopped, dead or cut off. Time is counted by the thread's own ticks, each a little at most: neither a clock that is set
nor a process that was suspended for an hour is a stall. A main thread that stays in C code without giving up Python's
interpreter stops this thread too: then the others name the rank, and faulthandler's thread, which needs none, leaves
its stacks in the log."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_ettin.base.errors import EXIT_REQUEUE
from megatron_ettin.base.log import ERRORS, flush, log_warning
from megatron_ettin.faults.hang_report import (
    FOLDER,
    RankInfo,
    RankStatus,
    hang_report,
    read_status,
    status_path,
    write_status,
)
from megatron_ettin.parallel.collectives import all_gather_object
from megatron_ettin.parallel.failure_report import SLOW_FACTOR, Heartbeat, record_stall, write_record
from megatron_ettin.platform import flight_recorder

ANSWER_SECONDS = 3.0  # that ranks may differ in seeing a stall
REPORTERS = 8  # ranks of which the first that is alive reports
TURN_SECONDS = 2.0  # each waits so long for the ones before it
C_CODE_SECONDS = 30.0  # later than the others have ended
KEPT_STALLS = 10
REPORT, CLAIM = "report.json", ".reporter"


def collective_seconds(hang_seconds: float) -> float:
    """How long a collective may take by the process groups' own timeouts: longer than the watchdog lets anything."""
    return hang_seconds * SLOW_FACTOR + 60.0


class Watchdog:
    """Of this rank during one run; a context. Collective, for ranks tell each other host and process."""

    def __init__(self, run_dir: Path, heartbeat: Heartbeat, rank: int) -> None:
        self.folder, self.heartbeat, self.rank = run_dir / FOLDER, heartbeat, rank
        self.peers, self.launch = meet(rank)
        self.stall_folder = self.folder / f"stall-{self.launch}"
        self.tick_seconds = min(1.0, heartbeat.hang_seconds / 10)
        self.sign_seconds = max(1.0, heartbeat.hang_seconds / 4)
        self.stalled = False
        self._signs = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            forget_old_stalls(self.folder)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception):
            self.explain()
        self._end.set()
        self._thread.join()
        status_path(self.folder, self.rank).unlink(missing_ok=True)

    def explain(self) -> None:
        """Of an error in the main thread: where a stall is its cause (the others have ended), end as they did."""
        if self.stalled:
            self._thread.join()  # it ends the process
        if (self.stall_folder / REPORT).exists():
            end()

    def _watch(self) -> None:
        ticks, still, since_sign, before = -1, 0.0, 0.0, time.monotonic()
        while not self._end.wait(self.tick_seconds):
            now = time.monotonic()
            tick, before = min(now - before, 2 * self.tick_seconds), now
            still = still + tick if ticks == self.heartbeat.ticks else 0.0
            ticks, since_sign = self.heartbeat.ticks, since_sign + tick
            if since_sign >= self.sign_seconds:
                since_sign = 0.0
                self._sign()
                self._expect_c_code()
            if still >= self.heartbeat.limit_seconds > 0:
                self._stall(still)
        faulthandler.cancel_dump_traceback_later()

    def _sign(self) -> None:
        self._signs += 1
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
        write_status(self.folder, self.launch, self.peers[self.rank], self.heartbeat, self._signs, self.stalled)

    def _expect_c_code(self) -> None:
        """Should this thread not come here again in time, for want of the interpreter: stacks to standard error."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            seconds = self.sign_seconds + self.heartbeat.limit_seconds + C_CODE_SECONDS
            faulthandler.dump_traceback_later(seconds, file=ERRORS)

    def _stall(self, seconds: float) -> NoReturn:
        """Leave what can be known of this rank, see that one rank reports, end."""
        self.stalled = True
        with contextlib.suppress(OSError):
            self.stall_folder.mkdir(parents=True, exist_ok=True)
            self._dump(seconds)
        self._sign()
        flight_recorder.dump(self.stall_folder / f"rank_{self.rank:05d}.trace")
        candidates = reporters(len(self.peers))
        turn = candidates.index(self.rank) if self.rank in candidates else len(candidates)
        if not self._reported_within(turn * TURN_SECONDS):
            if self.rank in candidates and self._claim():
                self._report(seconds)
            else:
                self._reported_within(ANSWER_SECONDS + 2 * TURN_SECONDS)
        end()

    def _dump(self, seconds: float) -> None:
        """Every thread's stack."""
        path = self.stall_folder / f"rank_{self.rank:05d}.txt"
        step = self.heartbeat.figures.get("step", 0)
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                f"{self.peers[self.rank]}: {self.heartbeat.doing} after step {step}, no progress for {seconds:.0f} s\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _claim(self) -> bool:
        """Whether this rank is the one to report; where nothing can be written, it is."""
        try:
            os.close(os.open(self.stall_folder / CLAIM, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass
        return True

    def _reported_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (self.stall_folder / REPORT).exists():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    def _report(self, seconds: float) -> None:
        """Wait for the others' answers, say whom they wait for."""
        found = hang_report(self.peers, self._answers())
        line = f"stalled for {seconds:.0f} s: {found.line}"
        if found.culprit is not None:
            record_stall(found.culprit.rank, found.culprit.host, line)
        else:
            record_stall(self.rank, "", line)  # of no host
        write_record(self.stall_folder / REPORT, {"line": line, "time": time.time()})
        told = f"ettin train: {line}; stacks in {self.stall_folder}"
        within(TURN_SECONDS, lambda: log_warning(told))

    def _answers(self) -> dict[int, RankStatus]:
        """The ranks' last signs."""
        signs: dict[int, RankStatus] = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            for peer in self.peers:
                if peer.rank not in signs or not signs[peer.rank].stalled:
                    sign = read_status(self.folder, self.launch, peer.rank)
                    if sign is not None:
                        signs[peer.rank] = sign
            if time.monotonic() > deadline or sum(sign.stalled for sign in signs.values()) == len(self.peers):
                return signs
            time.sleep(0.2)


def meet(rank: int) -> tuple[list[RankInfo], str]:
    """All ranks of the default group, and a name for this launch, the same on each. Collective."""
    ranks = all_gather_object((RankInfo.here(rank), f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
    return [peer for peer, _ in ranks], ranks[0][1]


def reporters(world: int) -> list[int]:
    """The first two ranks and some of other hosts, in the order of their turns."""
    return sorted({*range(min(2, world)), *range(0, world, -(-world // (REPORTERS - 1)))})


def forget_old_stalls(folder: Path, keep: int = KEPT_STALLS) -> None:
    """Remove all but the newest, and what ranks of launches that were killed left."""
    stalls: Sequence[Path] = sorted(folder.glob("stall-*"))
    for path in stalls[: max(0, len(stalls) - keep)]:
        shutil.rmtree(path, ignore_errors=True)
    for sign in folder.glob("rank_*.json"):
        sign.unlink(missing_ok=True)


def end() -> NoReturn:
    """End this process, whatever its main thread is in."""
    within(TURN_SECONDS, flush)
    os._exit(EXIT_REQUEUE)


def within(seconds: float, act: Callable[[], Any]) -> None:
    """Do something that may not come to an end: the main thread may hang in a print, with the file's lock."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
