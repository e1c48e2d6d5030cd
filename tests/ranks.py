"""Ranks of `ettin` as processes of their own, which may be stopped, killed, and end themselves: what the pool's workers
may not. They are forked from one server that has imported torch and core already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.pool import free_port, mutated

PRELOADED = ["megatron_ettin.train.chain", "megatron_ettin.cli.train", "tests.pool"]


def rank_main(
    rank: int, world: int, port: int, log: Path, command: list[str], mutation: str | None, environ: dict[str, str]
) -> None:
    """One rank's process, as torchrun would start it; what it prints goes to `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environ)  # of the test: the server has that of the first one
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    from megatron_ettin.cli.main import main

    try:
        with mutated(mutation):
            status = main(command)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the interpreter of a server that was forked has nothing of its own to end


class Ranks:
    """A launch of `world` ranks."""

    def __init__(self, world: int, folder: Path, command: list[str], mutation: str | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        port = free_port()
        environ = dict(os.environ)
        self.processes: list[ForkServerProcess] = []
        for rank, log in enumerate(self.logs):
            process = context.Process(target=rank_main, args=(rank, world, port, log, command, mutation, environ))
            process.start()
            self.processes.append(process)

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def wait(self, seconds: float, but: tuple[int, ...] = ()) -> list[int | None]:
        """Exit statuses, None of those that still run then; not waiting for `but`."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank not in but:
                process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    def close(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.exitcode is None:
                os.kill(self.pid(rank), signal.SIGKILL)
            process.join()
