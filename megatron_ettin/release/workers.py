"""Processes that make revisions, several at a time, each with one thread: figures of a parity record then do not
depend on the machine's number of cores, and a release that was interrupted ends in the same bytes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import psutil

from megatron_ettin.base.processes import serve_parent
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.sizes import parameter_count
from megatron_ettin.platform.memory import keep_freed_memory
from megatron_ettin.release.revision import Job, Outcome, make

# Measured: both models in float32 while they are compared, and the imports
BYTES_PER_PARAMETER, BASE_BYTES = 14, 900_000_000


class WorkerLost(Exception):
    """A worker process ended before its work did: not the user's typing, most often too little memory."""


def worker_count(wanted: int | None, jobs: int, model: ModelConfig) -> int:
    """`wanted`, or as many as there are cores, memory and revisions for; at least one."""
    if wanted is not None:
        return max(1, min(wanted, jobs))
    needed = BASE_BYTES + BYTES_PER_PARAMETER * parameter_count(model, model.vocab_size)
    room = int(psutil.virtual_memory().available * 0.9 / needed)
    return max(1, min(len(os.sched_getaffinity(0)), room, jobs))


def make_all(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """Make every job's revision; outcomes as they come. Raises WorkerLost."""
    context = multiprocessing.get_context("spawn")  # threads and torch do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_begin)
    try:
        for done in as_completed([pool.submit(make, job) for job in jobs]):
            yield done.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise WorkerLost(
            f"one of {workers} workers was killed, most likely for memory; what is released stays: run it again with"
            " fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # none but after an interruption
            process.terminate()


def _begin() -> None:
    """In each worker, before its first revision."""
    import torch

    serve_parent()
    keep_freed_memory()
    # as in the command itself: core and torch warn at length of what is optional
    warnings.filterwarnings("ignore", module=r"(megatron\.|torch\.|transformers\.|megatron_ettin\.platform\.cpu)")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
