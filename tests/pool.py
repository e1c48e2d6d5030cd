"""One pool of gloo workers per test session: each runs `ettin ...` as one rank, layout after layout, in its process.

Workers are forked from a process that has imported torch and core (tests/forkserver.py). A job is a command line. Every
rank joins a fresh process group through a file, so a world smaller than the pool leaves the other workers idle. A job
that fails or hangs on one rank leaves the others inside a collective, and a rank may be killed from outside, for memory:
then the pool is killed and started again, so that one test fails and not all that follow."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import os
import random
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests import forkserver

NO_ANSWER = "no answer in time"
DIED = "the worker died"
# descriptor of the worker's pipe, after its standard files
PIPE = 3


@dataclass(frozen=True)
class Result:
    """One rank's exit status and output."""

    status: int
    output: str


def free_port() -> int:
    """Return a free port below the range of ephemeral ports, so that nothing else gets it before it is used."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", random.SystemRandom().randrange(15_000, 32_000)))
            return int(listener.getsockname()[1])


def answers(pipes: list[Connection], timeout_seconds: float) -> list[Result]:
    """Return each worker's result; for one that died or sent none in time, a result that says so."""
    results = {pipe: Result(1, NO_ANSWER) for pipe in pipes}
    missing, end = set(pipes), time.monotonic() + timeout_seconds
    while missing and (ready := wait(missing, max(0.0, end - time.monotonic()))):
        for pipe in ready:
            try:
                results[pipe] = pipe.recv()
            except (EOFError, ConnectionResetError):
                results[pipe] = Result(1, DIED)
            if results[pipe].status == 1:
                # the other ranks would wait in vain for a rank that failed
                end = min(end, time.monotonic() + 10)
            missing.remove(pipe)
    return list(results.values())


def worker(rank: int) -> None:
    """Run jobs until the pipe is closed."""
    warnings.simplefilter("ignore")
    import torch.distributed as dist

    from megatron_ettin.cli.main import main
    from megatron_ettin.platform import detect

    detect("cpu")
    jobs = Connection(PIPE)
    while (job := receive(jobs)) is not None:
        world, store, port, command, mutation, folder = job
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        # later phases of the job use this rendezvous again
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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
        write_coverage()
        jobs.send(Result(status, printed.getvalue()))


def receive(jobs: Connection) -> tuple | None:
    try:
        return jobs.recv()
    except EOFError:
        return None


def warm_up_emulated(folder: str, major: int, minor: int) -> None:
    """Install the emulated Transformer Engine before core is imported."""
    from tests.emulated_te.install import install

    install(Path(folder), (major, minor))
    import torch

    torch.set_num_threads(1)
    for name in ("megatron_ettin.train.job", "megatron_ettin.cli.train", "megatron_ettin.train.trainer"):
        importlib.import_module(name)
    forkserver.freeze()


def give_back_memory() -> None:
    """Return freed memory to the system, because the allocator (platform/cpu.py) would keep a large job's gigabytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def write_coverage() -> None:
    """Save coverage.py's counts, if it runs, because a later job may kill the worker."""
    if "COVERAGE_RUN" in os.environ:
        from coverage import Coverage

        if (counting := Coverage.current()) is not None:
            counting.save()


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Apply a mistake, fault or condition of tests/mutations.py, fault_injection.py or conditions.py during one job.

    With `without:NAME` in the environment NAME is left out, so that tests/test_mutations.py can see its test fail."""
    mistake = os.environ.get(forkserver.MISTAKE_VARIABLE, "")
    with contextlib.ExitStack() as stack:
        for one in (name, None if mistake.startswith("without:") else mistake):
            if one and mistake != f"without:{one}":
                stack.enter_context(importlib.import_module("tests.mutations").find(one)())
        yield


class Pool:
    """Run commands on ranks.

    Args:
        emulated: (folder of Transformer Engine's Python, compute capability of the simulated device), to give the
            workers the emulated Transformer Engine (tests/emulated_te).
    """

    def __init__(self, emulated: tuple[Path, tuple[int, int]] | None = None) -> None:
        self.server: forkserver.ForkServer | None = None
        self.variables: dict[str, str] = {}
        if emulated is not None:
            from tests.emulated_te.install import VARIABLES

            self.variables = VARIABLES
            folder, capability = emulated
            self.server = forkserver.ForkServer("tests.pool:warm_up_emulated", [str(folder), *capability])
        self.workers: list[tuple[Connection, forkserver.Child]] = []

    def run(
        self,
        world: int,
        command: list[str],
        mutation: str | None = None,
        timeout_seconds: float = 180,
        cwd: Path | None = None,
    ) -> list[Result]:
        """Run `ettin COMMAND` on `world` ranks, in `cwd`. A rank without an answer in time counts as status 1."""
        if any(child.poll() is not None for _, child in self.workers):
            self.close_workers()
        while len(self.workers) < world:
            self.workers.append(self.start_worker(len(self.workers)))
        with tempfile.TemporaryDirectory() as folder:
            store, port = str(Path(folder) / "store"), free_port()
            for pipe, _ in self.workers[:world]:
                pipe.send((world, store, port, command, mutation, cwd or Path.cwd()))
            results = answers([pipe for pipe, _ in self.workers[:world]], timeout_seconds)
        lost = [number for number, result in enumerate(results) if result.output in (NO_ANSWER, DIED)]
        for number in lost:
            if results[number].output == DIED:
                # the status tells a signal from an exit
                results[number] = Result(1, f"{DIED} with status {self.workers[number][1].wait(10)}")
        if lost:
            self.close_workers()
        return results

    def start_worker(self, rank: int) -> tuple[Connection, forkserver.Child]:
        ours, theirs = socket.socketpair()
        with theirs:
            path = self.server.path if self.server else forkserver.shared()
            files = [0, 1, 2, theirs.fileno()]
            process = self.server.process if self.server else None
            environment = {**os.environ, **self.variables}
            child = forkserver.call(path, "tests.pool:worker", [rank], files, environment, process)
        return Connection(ours.detach()), child

    def close_workers(self, timeout_seconds: float = 0.001) -> None:
        """Close the workers' pipes and wait for them; kill those that do not exit in time."""
        for pipe, _ in self.workers:
            pipe.close()
        for _, child in self.workers:
            child.wait(timeout_seconds)
            child.close()
        self.workers = []

    def close(self) -> None:
        """End the workers, and their fork server if this pool started it."""
        # idle workers exit at once and save coverage.py's counts
        self.close_workers(timeout_seconds=10)
        if self.server:
            self.server.close()
