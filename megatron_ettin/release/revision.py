"""Making one revision: a checkpoint, or the initial weights, converted, verified and put in its place whole.

Processes that make revisions, several at a time, each with one thread: figures of a parity record then do not
depend on the machine's number of cores, and a release that was interrupted ends in the same bytes."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import publish_folder
from megatron_ettin.base.processes import serve_parent
from megatron_ettin.checkpoint.directory import list_checkpoints, seal_and_rename
from megatron_ettin.checkpoint.integrity import check_nothing_else
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import OBJECTIVES, parameter_count
from megatron_ettin.convert.model_card import About, model_card
from megatron_ettin.convert.rules import pairs
from megatron_ettin.convert.to_hf import to_hf
from megatron_ettin.convert.verify import Logits, ParityError
from megatron_ettin.platform.memory import keep_freed_memory
from megatron_ettin.release.chain import PhaseRun, Revision
from megatron_ettin.release.record import Options, made_of, write_record

WORK = ".work"  # what is being made, in the release's folder; gone when it is done


@dataclass(frozen=True)
class Job:
    """What a worker needs to make one revision of the release in `out`."""

    revision: Revision
    out: Path
    options: Options
    our_logits: Logits


@dataclass(frozen=True)
class Outcome:
    """`error` says why there is no such revision."""

    name: str
    seconds: float
    error: str | None = None


def make(job: Job) -> Outcome:
    """Convert, verify, place. A checkpoint that cannot be released is told of; the others go on."""
    began = time.perf_counter()
    error = None
    try:
        _make(job)
    except (UserError, ParityError) as refused:
        error = str(refused)
    except OSError as refused:
        error = f"{job.out}: cannot be written ({refused.strerror or refused})"
    if error is not None and job.revision.checkpoint is not None and not job.revision.checkpoint.is_dir():
        error = f"{job.revision.checkpoint}: was removed while it was read; a run keeps checkpoint.keep of them"
    return Outcome(job.revision.name, time.perf_counter() - began, error)


def _make(job: Job) -> None:
    revision, options = job.revision, job.options
    made = made_of(revision, options)
    folder = job.out / WORK / revision.name
    checkpoint = revision.checkpoint or write_initial(revision.run, folder.with_name(f"{revision.name}.initial"))
    card = functools.partial(
        model_card, about=About(options.name, options.licence, revision.name, revision.total_tokens)
    )
    to_hf(checkpoint, folder, options.dtype, True, options.max_shard_bytes, job.our_logits, card=card)
    write_record(folder, made)
    put(folder, job.out / revision.name)


def put(folder: Path, final: Path) -> None:
    """Rename a finished folder to `final`; one that is there is moved aside first and removed last."""
    publish_folder(folder, final, aside=folder.with_name(f"{final.name}.replaced"))


def write_initial(run: PhaseRun, folder: Path) -> Path:
    """A checkpoint of the weights that `run` began with: a function of its seed and shape, in the run's precision."""
    from megatron_ettin.model.init import recipe_weights

    config = run.config
    dtype = torch.float32 if config.precision.name == "fp32" else torch.bfloat16
    full_of = recipe_weights(config.run.seed, config.model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in pairs(config.model, OBJECTIVES[config.run.objective].exports[0]):
            yield pair.ours, full_of(pair.ours, list(pair.shape)).to(dtype)

    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    progress = {"step": 0, "tokens": 0}
    known = write_weights(staging, tensors(), {"progress": progress})
    (staging / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
    (staging / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    tokenizer = next((path / "tokenizer" for path in list_checkpoints(run.path)), None)
    if tokenizer is not None and tokenizer.is_dir():
        check_nothing_else(tokenizer.parent)
        shutil.copytree(tokenizer, staging / "tokenizer")
    seal_and_rename(staging, folder, known)
    return folder


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
