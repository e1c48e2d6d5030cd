"""Make micro-batches ahead of the step in worker processes, which read, label and lay out; the order is kept.

torch's DataLoader with the data order as its sampler: what is asked for is (step, index), so the answer is the same for
any number of workers, and a resume needs the step alone. Ranks of one pipeline or tensor group make the same rows, each
for itself; nothing is broadcast. Workers start from a fork server, never by a fork of this process, whose threads
(gloo, CUDA) a fork would break; they hold neither Megatron nor a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset as TorchDataset

from megatron_ettin.base.errors import RankError, UserError, first_line
from megatron_ettin.base.processes import serve_parent
from megatron_ettin.batching.host import HostBatch, HostBatches

# default on a GPU; without one, no cores are left for workers
GPU_WORKERS = 2
LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """A HostBatch with its arrays as tensors."""

    host: HostBatch
    input_ids: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, host: HostBatch) -> LoadedBatch:
        return cls(host, torch.from_numpy(host.input_ids), torch.from_numpy(host.labels))


@dataclasses.dataclass(frozen=True)
class WorkerResult:
    """Result of a worker: a micro-batch, or the line of a UserError, which torch would wrap in a traceback."""

    batch: HostBatch | None
    mistake: str = ""
    tensors: LoadedBatch | None = None

    def pin_memory(self) -> WorkerResult:
        """Return the same in page-locked tensors, which a GPU copies while it computes; torch's pin thread calls it."""
        if self.batch is None:
            return self
        loaded = LoadedBatch.of(self.batch)
        pinned = LoadedBatch(self.batch, loaded.input_ids.pin_memory(), loaded.labels.pin_memory())
        return dataclasses.replace(self, tensors=pinned)


class MicroBatchDataset(TorchDataset):
    """Map-style dataset of `HostBatches`: an item for every (step, index)."""

    def __init__(self, batches: HostBatches) -> None:
        self.batches = batches

    def __getitem__(self, key: tuple[int, int]) -> WorkerResult:
        try:
            return WorkerResult(self.batches.make(*key))
        except UserError as error:
            return WorkerResult(None, str(error))


@dataclasses.dataclass(frozen=True)
class StepSampler:
    """Sampler of every (step, index) from `first_step` on, up to `end_step` where there is one."""

    batches: HostBatches
    first_step: int
    end_step: int | None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in itertools.count(self.first_step):
            if self.end_step is not None and step >= self.end_step:
                return
            yield from ((step, index) for index in range(self.batches.count(step)))


class Loader:
    """Micro-batches of consecutive steps from `first_step` on; `end_step`: where the run ends, if that is known.

    `workers` processes make up to `prefetch` micro-batches each ahead of what is asked for; 0 makes them here, when
    they are asked for. `pinned`: for a GPU.
    """

    def __init__(
        self,
        batches: HostBatches,
        first_step: int,
        end_step: int | None = None,
        workers: int = 0,
        prefetch: int = 4,
        pinned: bool = False,
    ) -> None:
        self.batches = batches
        self.next_step = first_step
        order: Iterable[Any] = StepSampler(batches, first_step, end_step)
        options: dict[str, Any] = {}
        if workers:
            options = {
                "multiprocessing_context": multiprocessing.get_context("forkserver"),
                "prefetch_factor": prefetch,
                "worker_init_fn": start_worker,
            }
            multiprocessing.set_forkserver_preload([__name__])
        loader: DataLoader[Any] = DataLoader(
            MicroBatchDataset(batches),
            sampler=order,
            batch_size=None,
            collate_fn=identity,
            num_workers=workers,
            pin_memory=pinned,
            # or torch would draw from the run's generator
            generator=torch.Generator(),
            **options,
        )
        with signals_blocked(LEFT_TO_THE_PARENT):
            self._items: Iterator[WorkerResult] | None = iter(loader)

    def step(self, step: int) -> Iterator[LoadedBatch]:
        """Return an iterator over this rank's micro-batches of `step`.

        Steps are read one after another, each to its end. Raises RankError where the data cannot be read or a worker
        was lost.
        """
        if step != self.next_step or self._items is None:
            raise ValueError(f"step {step} was requested where {self.next_step} comes next")
        self.next_step += 1
        return itertools.islice(self._loaded(), self.batches.count(step))

    def close(self) -> None:
        """Stop the workers."""
        shut_down = getattr(self._items, "_shutdown_workers", None)
        self._items = None
        if shut_down is not None:
            shut_down()

    def _loaded(self) -> Iterator[LoadedBatch]:
        assert self._items is not None
        while True:
            try:
                loaded = next(self._items)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                cause = first_line(error)
                raise RankError(
                    f"data.workers: {cause}; out of memory, or a data file that shrank? data.workers=0 reads in the"
                    " training process"
                ) from None
            if loaded.batch is None:
                raise RankError(loaded.mistake)
            yield loaded.tensors or LoadedBatch.of(loaded.batch)


def worker_count(wanted: int | None, is_gpu: bool) -> int:
    """Return `data.workers`, or the default for the device."""
    return wanted if wanted is not None else GPU_WORKERS if is_gpu else 0


def start_worker(worker: int) -> None:
    serve_parent()


def identity(item: Any) -> Any:
    return item


@contextlib.contextmanager
def signals_blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals, so that processes started within leave them to this one.

    A scheduler sends its warning to every process of a job. The run then finishes its step, for which it still needs
    its workers and their fork server.
    """
    # the first use of multiprocessing starts its resource tracker and then unblocks SIGINT and SIGTERM, whatever was
    # blocked before: a fork server that is started right after it would be ended by the scheduler's SIGTERM
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
