"""Make revisions: convert a checkpoint or the initial weights, verify the result, and publish it when it is complete.

Several processes make revisions at a time, each with one thread: the figures of a parity record then do not depend on
the number of cores, and a release that was interrupted ends in the same bytes.
"""

from __future__ import annotations

import functools
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

from megatron_ettin.base.errors import UserError, serve_parent
from megatron_ettin.base.files import publish_folder
from megatron_ettin.checkpoint.directory import list_checkpoints
from megatron_ettin.checkpoint.integrity import check_nothing_else
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import OBJECTIVES, parameter_count
from megatron_ettin.convert.importing import write_checkpoint
from megatron_ettin.convert.model_card import CardInfo, model_card
from megatron_ettin.convert.rules import weight_mappings
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from megatron_ettin.convert.verify import Logits, ParityError
from megatron_ettin.platform.cpu import keep_freed_memory
from megatron_ettin.release.chain import Revision
from megatron_ettin.release.record import WORK, ReleaseOptions, expected_record, write_record
from megatron_ettin.runs.directory import RunDirectory

BYTES_PER_PARAMETER, BASE_BYTES = 14, 900_000_000
"""Memory of a worker, measured: both models in float32 while they are compared, and the imports."""


class WorkerLostError(Exception):
    """A worker process ended before its work did: no mistake of the user, most often too little memory."""


@dataclass(frozen=True)
class RevisionJob:
    """Arguments for a worker that makes one revision of the release in `out`."""

    revision: Revision
    out: Path
    options: ReleaseOptions
    our_logits: Logits


@dataclass(frozen=True)
class RevisionResult:
    """The outcome of one revision."""

    name: str
    seconds: float
    error: str | None = None
    """Reason why there is no such revision."""


def make_revision(job: RevisionJob) -> RevisionResult:
    """Convert, verify and publish one revision.

    A checkpoint that cannot be released is reported in the result, so that the others go on.
    """
    began = time.perf_counter()
    revision, options, error = job.revision, job.options, None
    folder = job.out / WORK / revision.name
    try:
        expected = expected_record(revision, options)
        checkpoint = revision.checkpoint or write_initial(revision.run, folder.with_name(f"{revision.name}.initial"))
        info = CardInfo(options.name, options.licence, revision.name, revision.total_tokens)
        card = functools.partial(model_card, info=info)
        export = ExportOptions(options.dtype, None, options.max_shard_bytes, verify=True, our_logits=job.our_logits)
        to_hf(checkpoint, folder, export, card=card)
        write_record(folder, expected)
        publish_revision(folder, job.out / revision.name)
    except (UserError, ParityError) as refusal:
        error = str(refusal)
    except OSError as refusal:
        error = f"{job.out}: cannot be written ({refusal.strerror or refusal})"
    if error is not None and revision.checkpoint is not None and not revision.checkpoint.is_dir():
        error = f"{revision.checkpoint}: was removed while it was read; a run keeps checkpoint.keep of them"
    return RevisionResult(revision.name, time.perf_counter() - began, error)


def publish_revision(folder: Path, final: Path) -> None:
    """Rename a finished folder to `final`; a folder that is there is moved aside first and removed last."""
    publish_folder(folder, final, aside=folder.with_name(f"{final.name}.replaced"))


def write_initial(run: RunDirectory, folder: Path) -> Path:
    """Write a checkpoint of the weights that `run` began with: a function of its seed and shape, in its precision."""
    from megatron_ettin.model.init import recipe_weights

    config = run.config
    dtype = torch.float32 if config.precision.name == "fp32" else torch.bfloat16
    full_of = recipe_weights(config.run.seed, config.model)
    mappings = weight_mappings(config.model, OBJECTIVES[config.run.objective].exports[0])
    tensors = ((one.name, full_of(one.name, list(one.shape)).to(dtype)) for one in mappings)
    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer = next((path / "tokenizer" for path in list_checkpoints(run.path)), None)
    if tokenizer is not None and tokenizer.is_dir():
        check_nothing_else(tokenizer.parent)
        shutil.copytree(tokenizer, staging / "tokenizer")
    write_checkpoint(staging, folder, tensors, config, {"step": 0, "tokens": 0})
    return folder


def choose_worker_count(requested: int | None, jobs: int, model: ModelConfig) -> int:
    """Return the number of workers: as requested, or as cores, memory and revisions allow; at least one."""
    if requested is not None:
        return max(1, min(requested, jobs))
    needed = BASE_BYTES + BYTES_PER_PARAMETER * parameter_count(model, model.vocab_size)
    fitting = int(psutil.virtual_memory().available * 0.9 / needed)
    return max(1, min(len(os.sched_getaffinity(0)), fitting, jobs))


def make_revisions(jobs: Sequence[RevisionJob], workers: int) -> Iterator[RevisionResult]:
    """Make every job's revision in processes and yield results as they come. Raises WorkerLostError."""
    # threads and torch do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_initialize_worker)
    try:
        for done in as_completed([pool.submit(make_revision, job) for job in jobs]):
            yield done.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise WorkerLostError(
            f"one of {workers} workers was killed, most likely for memory; what is released stays: run it again with"
            " fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # there are none except after an interruption
        for process in multiprocessing.active_children():
            process.terminate()


def _initialize_worker() -> None:
    """Prepare a worker before its first revision."""
    serve_parent()
    keep_freed_memory()
    # as in the command itself: core and torch warn at length of optional features
    warnings.filterwarnings("ignore", module=r"(megatron\.|torch\.|transformers\.|megatron_ettin\.platform\.cpu)")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
