"""Prefetch micro-batches in worker processes, which read, label and lay out rows, and return them in order.

This is torch's DataLoader with a sampler of (step, index). So the micro-batches are the same for any number of workers,
and a resume needs only the step. Each rank of a pipeline or tensor group makes the same rows by itself; nothing is
broadcast. Workers start from a fork server, because a fork of this process would break its threads (gloo, CUDA). They
import no Megatron and use no device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset as TorchDataset

from megatron_ettin.base.errors import RankError, UserError, first_line, serve_parent
from megatron_ettin.batching.host import HostBatch, HostBatches

# default number of workers on a GPU; on a CPU it is 0, because the model needs the cores
GPU_WORKERS = 2
LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class MicroBatchDataset(TorchDataset["HostBatch | str"]):
    """Map-style dataset of `HostBatches`: an item for every (step, index).

    If making it raises UserError, the item is the error's message, because torch would wrap the error in a traceback.
    """

    def __init__(self, batches: HostBatches) -> None:
        self.batches = batches

    def __getitem__(self, key: tuple[int, int]) -> HostBatch | str:
        try:
            return self.batches.make(*key)
        except UserError as error:
            return str(error)


@contextlib.contextmanager
def load_batches(
    batches: HostBatches, steps: Iterable[int], workers: int = 0, prefetch: int = 4, pinned: bool = False
) -> Iterator[Iterator[HostBatch]]:
    """Yield an iterator over this rank's micro-batches of `steps`, and stop the workers at the end.

    The iterator raises RankError if the data cannot be read or a worker has ended.

    Args:
        batches: maker of the micro-batches.
        steps: the steps in order, without end if the last one is not known.
        workers: number of processes; 0 makes each micro-batch in this process when it is needed.
        prefetch: number of micro-batches that each worker makes ahead.
        pinned: whether the arrays are pinned for a GPU.
    """
    options: dict[str, Any] = {}
    if workers:
        options = {
            "multiprocessing_context": multiprocessing.get_context("forkserver"),
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
        }
        multiprocessing.set_forkserver_preload([__name__])
    loader = DataLoader(
        MicroBatchDataset(batches),
        sampler=((step, index) for step in steps for index in range(batches.count(step))),
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        # without one, torch would draw the workers' seed from the global generator, which the run uses
        generator=torch.Generator(),
        **options,
    )
    with signals_blocked(LEFT_TO_THE_PARENT):
        items: Any = iter(loader)
    try:
        yield checked(items)
    finally:
        if workers:
            items._shutdown_workers()


def checked(items: Iterator[HostBatch | str]) -> Iterator[HostBatch]:
    """Yield the micro-batches among `items`. Raises RankError for an item that is a message, or if a worker died."""
    try:
        for item in items:
            if isinstance(item, str):
                raise RankError(item)
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RankError(
            f"data.workers: {first_line(error)}; out of memory, or a data file that shrank? data.workers=0 reads in"
            " the training process"
        ) from None


def worker_count(wanted: int | None, is_gpu: bool) -> int:
    """Return `data.workers`, or the default for the device."""
    return wanted if wanted is not None else GPU_WORKERS if is_gpu else 0


def start_worker(worker: int) -> None:
    """Make this worker process exit when its parent does, and ignore Ctrl-C. DataLoader passes the worker's number."""
    serve_parent()


@contextlib.contextmanager
def signals_blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals during the block. Processes that it starts keep them blocked, so only this process acts on them.

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
