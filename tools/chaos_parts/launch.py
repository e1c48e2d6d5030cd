"""One launch of a run: ranks as real processes, and actions at times that follow the run's own progress.

When a rank has failed, the other ranks get some seconds to exit and are then killed, as by a launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_parts.zygote import Zygote
from tests.pool import free_port

# time for the other ranks to end after one has failed
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.02


@dataclass
class Action:
    """`act` is called `delay` seconds after the run has recorded `after_step` (-1: after its start)."""

    name: str
    after_step: int
    delay: float
    act: Callable[[Launch], Any]
    armed: float | None = None

    def is_due(self, steps: int) -> bool:
        if self.armed is None and steps >= self.after_step:
            self.armed = time.monotonic() + self.delay
        return self.armed is not None and time.monotonic() >= self.armed


@dataclass
class RankHost:
    """The host side of ranks: how they start.

    `mutation`: a name of tests/mutations.py; `networks`: each rank's namespace and address; `clock`: (rank, file).
    """

    zygote: Zygote
    ranks: int
    mutation: str | None = None
    networks: list[tuple[str, str]] = field(default_factory=list)
    clock: tuple[int, Path] | None = None


class Launch:
    """Running ranks of `ettin COMMAND`. Their output is in folder/rankN.log."""

    def __init__(
        self, host: RankHost, run_dir: Path, folder: Path, command: list[str], save_marker: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host, self.run_dir, self.began = host, run_dir, time.monotonic()
        self.logs = [folder / f"rank{rank}.log" for rank in range(host.ranks)]
        address = host.networks[0][1] if host.networks else "127.0.0.1"
        shared = {"WORLD_SIZE": str(host.ranks), "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        if host.networks:
            shared["GLOO_SOCKET_IFNAME"] = "eth0"
        self.pids = []
        for rank, log in enumerate(self.logs):
            request = {
                "command": command,
                "mutation": host.mutation,
                "log": str(log),
                "environment": {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "namespace": host.networks[rank][0] if host.networks else None,
                "save_marker": str(save_marker) if save_marker else None,
                "clock": str(host.clock[1]) if host.clock and host.clock[0] == rank else None,
            }
            self.pids.append(host.zygote.fork(request))

    def statuses(self) -> list[int | None]:
        return [self.host.zygote.status(pid) for pid in self.pids]

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.pids)):
            if self.host.zygote.status(self.pids[rank]) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def steps(self) -> int:
        """Return the number of steps that the run has recorded."""
        try:
            return (self.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return -1

    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def finish(self, actions: list[Action], limit_seconds: float) -> tuple[list[int], list[str], bool]:
        """Wait for all ranks; return their statuses, the faults, and whether the tool had to kill them.

        It kills them `limit_seconds` after the start or the last action.
        """
        done, failed_at, too_long, last = [], None, False, self.began
        while None in (statuses := self.statuses()):
            now, steps = time.monotonic(), self.steps()
            for action in [action for action in actions if action.is_due(steps)]:
                actions.remove(action)
                done.append(f"{action.name} at {now - self.began:.2f} s, step {steps}")
                action.act(self)
                last = time.monotonic()
            if failed_at is None and any(status not in (None, 0) for status in statuses):
                failed_at = now
            too_long = too_long or now - last > limit_seconds
            if too_long or (failed_at is not None and now - failed_at > GRACE_SECONDS):
                self.signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        return [int(status) for status in statuses if status is not None], done, too_long
