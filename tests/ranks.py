"""Start ranks of `ettin` as separate processes, which tests may stop and kill, unlike the pool's workers.

They are forked from the test session's server (tests/forkserver.py)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests import forkserver
from tests.pool import free_port, mutated


def be_rank(command: list[str], mutation: str | None) -> int:
    """Run `ettin COMMAND` as one rank, as torchrun would start it."""
    from megatron_ettin.cli.main import main

    with mutated(mutation):
        return main(command)


class Ranks:
    """A launch of `world` ranks; the output of rank N goes to folder/rankN.log."""

    def __init__(self, world: int, folder: Path, command: list[str], mutation: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        shared = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        shared.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        self.processes: list[forkserver.Child] = []
        for rank, log in enumerate(self.logs):
            with open(log, "ab") as out:
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                files = (0, out.fileno(), out.fileno())
                server = forkserver.shared()
                child = forkserver.call(server, "tests.ranks:be_rank", [command, mutation], files, environment)
            self.processes.append(child)

    def pid(self, rank: int) -> int:
        """Return the process id of a rank."""
        return self.processes[rank].pid

    def wait(self, seconds: float, but: tuple[int, ...] = ()) -> list[int | None]:
        """Wait for all ranks except those in `but`, and return every exit status; None for a rank that still runs."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank not in but:
                process.wait(max(0.001, deadline - time.monotonic()))
        return [process.poll() for process in self.processes]

    def output(self) -> str:
        """Return the output of all ranks as one text."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def close(self) -> None:
        for process in self.processes:
            process.close()
