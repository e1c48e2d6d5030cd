"""One pool of gloo workers a test session: each runs `ettin ...` as one rank, layout after layout, in process.

Importing torch and core costs seconds a process; a pool pays it once. A job is a command line; every rank joins a
fresh process group by a file, so that worlds smaller than the pool leave the other workers idle. A job that fails or
hangs on one rank leaves the others inside a collective: the pool is then killed and made anew."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One rank's exit status and what it printed."""

    status: int
    output: str


def worker(rank: int, jobs: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megatron_ettin.cli.main import main
    from megatron_ettin.platform import detect

    detect("cpu")
    while (job := jobs.recv()) is not None:
        world, store, command, mutation = job
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), mutated(mutation):
                dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
                status = main(command)
        except BaseException:
            status = 1
            printed.write(traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        jobs.send(Result(status, printed.getvalue()))


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """A deliberate mistake of tests/mutations.py during one job."""
    if name is None:
        yield
        return
    with getattr(importlib.import_module("tests.mutations"), name)():
        yield


class Pool:
    """`run` starts the workers it needs and returns one Result a rank."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple[Connection, multiprocessing.process.BaseProcess]] = []

    def run(
        self, world: int, command: list[str], mutation: str | None = None, timeout_seconds: float = 180
    ) -> list[Result]:
        """`ettin COMMAND` on `world` ranks. A rank without an answer in time counts as status 1."""
        while len(self.workers) < world:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=worker, args=(len(self.workers), theirs))
            process.start()
            self.workers.append((ours, process))
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for pipe, _ in self.workers[:world]:
                pipe.send((world, store, command, mutation))
            results, end = [], time.monotonic() + timeout_seconds
            for pipe, _ in self.workers[:world]:
                answered = pipe.poll(max(0.0, end - time.monotonic()))
                results.append(pipe.recv() if answered else Result(1, "no answer in time"))
                if results[-1].status == 1:
                    end = min(end, time.monotonic() + 10)  # the others wait for it in vain
        if any(result.output == "no answer in time" for result in results):
            self.close()
        return results

    def close(self) -> None:
        for pipe, process in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []
