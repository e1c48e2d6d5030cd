"""One pool of gloo workers a test session: each runs `ettin ...` as one rank, layout after layout, in process.

Importing torch and core costs seconds a process; a pool pays it once. A job is a command line; every rank joins a
fresh process group by a file, so that worlds smaller than the pool leave the other workers idle. A job that fails or
hangs on one rank leaves the others inside a collective, and a rank may be killed from outside, for memory: the pool is
then killed and made anew, so that one test fails and not all that follow."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

NO_ANSWER = "no answer in time"
DIED = "the worker died"


@dataclass(frozen=True)
class Result:
    """One rank's exit status and what it printed."""

    status: int
    output: str


def free_port() -> int:
    """Below the range that systems hand out by themselves: gloo listens on such ports, and the port is used later."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", random.SystemRandom().randrange(15_000, 32_000)))
            return int(found.getsockname()[1])


def answers(pipes: list[Connection], timeout_seconds: float) -> list[Result]:
    """What each worker sends, or that it sent nothing or is gone."""
    results = {pipe: Result(1, NO_ANSWER) for pipe in pipes}
    missing, end = set(pipes), time.monotonic() + timeout_seconds
    while missing and (ready := wait(missing, max(0.0, end - time.monotonic()))):
        for pipe in ready:
            try:
                results[pipe] = pipe.recv()
            except (EOFError, ConnectionResetError):
                results[pipe] = Result(1, DIED)
            if results[pipe].status == 1:
                end = min(end, time.monotonic() + 10)  # the others wait for it in vain
            missing.remove(pipe)
    return list(results.values())


def worker(rank: int, jobs: Connection, emulated: tuple[Path, tuple[int, int]] | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    warnings.simplefilter("ignore")
    if emulated is not None:
        from tests.emulated_te.install import install

        install(*emulated)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megatron_ettin.cli.main import main
    from megatron_ettin.platform import detect

    detect("cpu")
    while (job := jobs.recv()) is not None:
        world, store, port, command, mutation, folder = job
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # where later phases of one job join again
        printed = io.StringIO()
        try:
            os.chdir(folder)
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), mutated(mutation):
                dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
                status = main(command)
        except BaseException:
            status = 1
            printed.write(traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        give_back_memory()
        jobs.send(Result(status, printed.getvalue()))


def give_back_memory() -> None:
    """A job of a large shape leaves its gigabytes with the allocator (platform/memory.py), and the pool lives long."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """A deliberate mistake of tests/mutations.py during one job."""
    if name is None:
        yield
        return
    with getattr(importlib.import_module("tests.mutations"), name)():
        yield


class Pool:
    """`run` starts the workers it needs and returns one Result a rank. `emulated`: where Transformer Engine's Python is,
    which they then have, and the capability of their device (tests/emulated_te)."""

    def __init__(self, emulated: tuple[Path, tuple[int, int]] | None = None) -> None:
        self.emulated = emulated
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple[Connection, multiprocessing.process.BaseProcess]] = []

    def run(
        self,
        world: int,
        command: list[str],
        mutation: str | None = None,
        timeout_seconds: float = 180,
        cwd: Path | None = None,
    ) -> list[Result]:
        """`ettin COMMAND` on `world` ranks, in `cwd`. A rank without an answer in time counts as status 1."""
        if not all(process.is_alive() for _, process in self.workers):
            self.close()
        while len(self.workers) < world:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=worker, args=(len(self.workers), theirs, self.emulated))
            process.start()
            theirs.close()  # so that a dead worker reads as an end of file
            self.workers.append((ours, process))
        with tempfile.TemporaryDirectory() as folder:
            store, port = str(Path(folder) / "store"), free_port()
            for pipe, _ in self.workers[:world]:
                pipe.send((world, store, port, command, mutation, cwd or Path.cwd()))
            results = answers([pipe for pipe, _ in self.workers[:world]], timeout_seconds)
        if any(result.output in (NO_ANSWER, DIED) for result in results):
            self.close()
        return results

    def close(self) -> None:
        for pipe, process in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []
