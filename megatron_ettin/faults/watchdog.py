"""Watch the progress of every rank's main thread from a second thread.

If there is no progress, each rank writes every thread's Python stack and torch's flight recorder to
RUN/watch/stall-TIME. One rank reports which rank the others wait for, and all ranks exit with status 75.

Ranks step together, so all of them notice a stall at nearly the same time. A rank that writes no status then is
stopped, dead or cut off. The thread counts time by its own ticks, each of limited length, so a change of the clock or
an hour of suspension is no stall. A main thread in C code that does not release Python's global lock stops this thread
too. Then the other ranks name that rank, and faulthandler's thread, which does not need that lock, writes its stacks to
the log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_ettin.base.errors import EXIT_REQUEUE
from megatron_ettin.base.log import ERRORS, flush, log_warning
from megatron_ettin.faults.heartbeat import (
    SLOW_FACTOR,
    Heartbeat,
    RankInfo,
    RankStatus,
    read_rank_status,
    status_path,
    write_rank_status,
)
from megatron_ettin.parallel.collectives import all_gather_object
from megatron_ettin.parallel.failure_report import record_stall, write_status
from megatron_ettin.platform.profiler import dump_flight_recorder

# time in which all ranks notice the same stall
ANSWER_SECONDS = 3.0
# number of ranks that may report; the first of them that is alive does
REPORTERS = 8
# time that a reporter leaves to each reporter before it
TURN_SECONDS = 2.0
# additional time, so that faulthandler writes after the other ranks have ended
C_CODE_SECONDS = 30.0
KEPT_STALLS = 10
REPORT, CLAIM = "report.json", ".reporter"
FOLDER = "watch"
LISTED_RANKS = 3


def collective_seconds(hang_seconds: float) -> float:
    """Return the timeout in seconds for collectives, which is longer than the watchdog allows any phase."""
    return hang_seconds * SLOW_FACTOR + 60.0


class Watchdog:
    """Watchdog of this rank during one run, as a context manager.

    The constructor is collective, because the ranks exchange their hosts and process ids.
    """

    def __init__(self, run_dir: Path, heartbeat: Heartbeat, rank: int) -> None:
        self.folder, self.heartbeat, self.rank = run_dir / FOLDER, heartbeat, rank
        self.peers, self.launch = gather_rank_info(rank)
        self.stall_folder = self.folder / f"stall-{self.launch}"
        self.tick_seconds = min(1.0, heartbeat.hang_seconds / 10)
        self.status_seconds = max(1.0, heartbeat.hang_seconds / 4)
        self.stalled = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            remove_old_stalls(self.folder)
        self._thread.start()
        return self

    def __exit__(self, error_type: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception):
            self.explain()
        self._end.set()
        self._thread.join()
        status_path(self.folder, self.rank).unlink(missing_ok=True)

    def explain(self) -> None:
        """Exit with status 75, as the other ranks do, if a stall caused the main thread's error; otherwise return."""
        if self.stalled:
            # the watchdog thread ends the process
            self._thread.join()
        if (self.stall_folder / REPORT).exists():
            exit_for_requeue()

    def _watch(self) -> None:
        ticks, idle_seconds, since_status, before = -1, 0.0, 0.0, time.monotonic()
        while not self._end.wait(self.tick_seconds):
            now = time.monotonic()
            tick, before = min(now - before, 2 * self.tick_seconds), now
            idle_seconds = idle_seconds + tick if ticks == self.heartbeat.ticks else 0.0
            ticks, since_status = self.heartbeat.ticks, since_status + tick
            if since_status >= self.status_seconds:
                since_status = 0.0
                self._write_status()
                self._schedule_stack_dump()
            if idle_seconds >= self.heartbeat.limit_seconds > 0:
                self._stall(idle_seconds)
        faulthandler.cancel_dump_traceback_later()

    def _write_status(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
        write_rank_status(self.folder, self.launch, self.peers[self.rank], self.heartbeat, self.stalled)

    def _schedule_stack_dump(self) -> None:
        """Have faulthandler write stacks to standard error unless this thread calls this method again in time."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            seconds = self.status_seconds + self.heartbeat.limit_seconds + C_CODE_SECONDS
            faulthandler.dump_traceback_later(seconds, file=ERRORS)

    def _stall(self, seconds: float) -> NoReturn:
        """Write this rank's stacks and status, make sure that one rank reports, and exit with status 75."""
        self.stalled = True
        with contextlib.suppress(OSError):
            self.stall_folder.mkdir(parents=True, exist_ok=True)
            self._dump(seconds)
        self._write_status()
        dump_flight_recorder(self.stall_folder / f"rank_{self.rank:05d}.trace")
        candidates = reporters(len(self.peers))
        turn = candidates.index(self.rank) if self.rank in candidates else len(candidates)
        if not self._reported_within(turn * TURN_SECONDS):
            if self.rank in candidates and self._claim():
                self._report(seconds)
            else:
                self._reported_within(ANSWER_SECONDS + 2 * TURN_SECONDS)
        exit_for_requeue()

    def _dump(self, seconds: float) -> None:
        """Write every thread's stack to this rank's file in the stall folder."""
        path = self.stall_folder / f"rank_{self.rank:05d}.txt"
        step = self.heartbeat.figures.get("step", 0)
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                f"{self.peers[self.rank]}: {self.heartbeat.doing} after step {step}, no progress for {seconds:.0f} s\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _claim(self) -> bool:
        """Create the file that makes this rank the reporter; return False if another rank has created it."""
        try:
            os.close(os.open(self.stall_folder / CLAIM, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            # nothing can be written, so other ranks cannot claim it either
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
        """Wait for the statuses of the other ranks, and report which rank the others wait for."""
        report = hang_report(self.peers, self._answers())
        line = f"stalled for {seconds:.0f} s: {report.line}"
        if report.failed_rank is not None:
            record_stall(report.failed_rank.rank, report.failed_rank.host, line)
        else:
            # an empty host, because no host is to blame
            record_stall(self.rank, "", line)
        write_status(self.stall_folder / REPORT, self.rank, line=line)
        message = f"ettin train: {line}; stacks in {self.stall_folder}"
        run_with_timeout(TURN_SECONDS, lambda: log_warning(message))

    def _answers(self) -> dict[int, RankStatus]:
        """Wait up to `ANSWER_SECONDS` until every rank has stalled, and return the latest status of each rank."""
        statuses: dict[int, RankStatus] = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            for peer in self.peers:
                if peer.rank not in statuses or not statuses[peer.rank].stalled:
                    status = read_rank_status(self.folder, self.launch, peer.rank)
                    if status is not None:
                        statuses[peer.rank] = status
            if time.monotonic() > deadline or sum(status.stalled for status in statuses.values()) == len(self.peers):
                return statuses
            time.sleep(0.2)


def gather_rank_info(rank: int) -> tuple[list[RankInfo], str]:
    """Return all ranks of the default group and a name for this launch, equal on every rank (collective)."""
    ranks = all_gather_object((RankInfo.here(rank), f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
    return [peer for peer, _ in ranks], ranks[0][1]


def reporters(world: int) -> list[int]:
    """Return the ranks that may report, in the order of their turns.

    They are the first two, and others at equal distances, so that large worlds have some on other hosts.
    """
    return sorted({*range(min(2, world)), *range(0, world, -(-world // (REPORTERS - 1)))})


def remove_old_stalls(folder: Path, keep: int = KEPT_STALLS) -> None:
    """Remove all but the newest `keep` stall folders, and the status files that killed launches left."""
    stalls: Sequence[Path] = sorted(folder.glob("stall-*"))
    for path in stalls[: max(0, len(stalls) - keep)]:
        shutil.rmtree(path, ignore_errors=True)
    for status in folder.glob("rank_*.json"):
        status.unlink(missing_ok=True)


def exit_for_requeue() -> NoReturn:
    """Exit this process with status 75, whatever its main thread does."""
    run_with_timeout(TURN_SECONDS, flush)
    os._exit(EXIT_REQUEUE)


def run_with_timeout(seconds: float, act: Callable[[], Any]) -> None:
    """Call a function in a thread, and return after at most `seconds`.

    The function may hang, for example on the lock of a file that the stuck main thread holds in a print.
    """
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


@dataclass(frozen=True)
class HangReport:
    """Report on the rank that the others wait for."""

    line: str
    """Message for the end of the log."""
    failed_rank: RankInfo | None
    """First rank that `line` blames; None if no rank is behind the others."""


def hang_report(peers: Sequence[RankInfo], statuses: Mapping[int, RankStatus]) -> HangReport:
    """Report which ranks the others wait for: those that gave no answer, else those with the least progress.

    Args:
        peers: all ranks.
        statuses: latest status by rank; a rank without one, or with one that is not `stalled`, gave no answer.
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
    """Return the end of the report's line, which names the operation that most of the other ranks wait in."""
    if not statuses:
        return ""
    (where, count), *_ = Counter(status.describe() for status in statuses).most_common(1)
    return f"; {'the others wait' if count == len(statuses) else f'{count} others wait'} in {where}"
