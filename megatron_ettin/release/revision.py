"""Make revisions: convert a checkpoint or the initial weights, verify the result, and publish it when it is complete.

Several processes make revisions concurrently, each with one thread. The numbers in a parity record then do not depend
on the number of cores, so a release that was interrupted ends in the same bytes.

release.json of a revision lists its source, and every file with its size and sha256. A second `ettin release` reads it
to keep finished revisions. A user who downloads a revision can check its files with it.
"""

from __future__ import annotations

import hashlib
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
from typing import Any

import psutil
import torch

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError, serve_parent
from megatron_ettin.base.files import fsync, publish_folder
from megatron_ettin.base.parsing import read_json_object
from megatron_ettin.base.paths import path_in
from megatron_ettin.checkpoint.directory import list_checkpoints
from megatron_ettin.checkpoint.integrity import INTEGRITY, check_nothing_else
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import OBJECTIVES, parameter_count
from megatron_ettin.convert.importing import write_checkpoint
from megatron_ettin.convert.model_card import CardInfo
from megatron_ettin.convert.rules import weight_mappings
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from megatron_ettin.convert.verify import Logits, ParityError
from megatron_ettin.platform.cpu import keep_freed_memory
from megatron_ettin.release.chain import Revision
from megatron_ettin.runs.directory import RunDirectory

RECORD = "release.json"
"""Record in each revision's folder; the file of this name in the release folder is the index."""
WORK = ".work"
"""Folder in the release for unfinished revisions; it is removed at the end."""
FORMAT = 2
"""Version of the format of a revision's content; a revision of another version is made again."""
BYTES_PER_PARAMETER, BASE_BYTES = 14, 900_000_000
"""Measured memory of a worker: both float32 models of the comparison (per parameter), and the libraries (base)."""


class WorkerLostError(Exception):
    """A worker process was killed, most often for lack of memory; not a mistake of the user."""


@dataclass(frozen=True)
class ReleaseOptions:
    """Options that, together with the checkpoint, decide the bytes of a revision."""

    name: str
    """Name of the model, for the cards."""
    dtype: str = "float32"
    max_shard_bytes: int = 5_000_000_000
    licence: str | None = None
    """SPDX identifier."""


@dataclass(frozen=True)
class RevisionResult:
    """The outcome of one revision."""

    name: str
    seconds: float
    error: str | None = None
    """Reason why the revision was not made; None if it was."""


def make_revision(revision: Revision, out: Path, options: ReleaseOptions, our_logits: Logits) -> RevisionResult:
    """Convert, verify and publish one revision of the release in `out`.

    An error is returned in the result, so that the other revisions go on.
    """
    began = time.perf_counter()
    folder, error = out / WORK / revision.name, None
    try:
        expected = expected_record(revision, options)
        checkpoint = revision.checkpoint or write_initial(revision.run, folder.with_name(f"{revision.name}.initial"))
        info = CardInfo(options.name, options.licence, revision.name, revision.total_tokens)
        export = ExportOptions(
            options.dtype, max_shard_bytes=options.max_shard_bytes, verify=True, our_logits=our_logits, info=info
        )
        to_hf(checkpoint, folder, export)
        write_record(folder, expected)
        publish_folder(folder, out / revision.name, aside=folder.with_name(f"{revision.name}.replaced"))
    except (UserError, ParityError) as refusal:
        error = str(refusal)
    except OSError as refusal:
        error = f"{out}: cannot be written ({refusal.strerror or refusal})"
    if error is not None and revision.checkpoint is not None and not revision.checkpoint.is_dir():
        error = f"{revision.checkpoint}: was removed while it was read; a run keeps checkpoint.keep of them"
    return RevisionResult(revision.name, time.perf_counter() - began, error)


def write_initial(run: RunDirectory, folder: Path) -> Path:
    """Write the initial weights of `run`, drawn again from its seed, as a checkpoint in `folder`; return `folder`."""
    from megatron_ettin.model.init import recipe_weights

    config = run.config
    dtype = torch.float32 if config.precision.name == "fp32" else torch.bfloat16
    full_of = recipe_weights(config.run.seed, config.model)
    mappings = weight_mappings(config.model, OBJECTIVES[config.run.objective].exports[0])
    tensors = ((weight.name, full_of(weight.name, list(weight.shape)).to(dtype)) for weight in mappings)
    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer = next((path / "tokenizer" for path in list_checkpoints(run.path)), None)
    if tokenizer is not None and tokenizer.is_dir():
        check_nothing_else(tokenizer.parent)
        shutil.copytree(tokenizer, staging / "tokenizer")
    write_checkpoint(staging, folder, tensors, config, {"step": 0, "tokens": 0})
    return folder


def choose_worker_count(requested: int | None, jobs: int, model: ModelConfig) -> int:
    """Return `requested`, or as many workers as cores and memory allow if it is None; at least 1, at most `jobs`."""
    if requested is not None:
        return max(1, min(requested, jobs))
    needed = BASE_BYTES + BYTES_PER_PARAMETER * parameter_count(model, model.vocab_size)
    fitting = int(psutil.virtual_memory().available * 0.9 / needed)
    return max(1, min(len(os.sched_getaffinity(0)), fitting, jobs))


def make_revisions(
    revisions: Sequence[Revision], out: Path, options: ReleaseOptions, our_logits: Logits, workers: int
) -> Iterator[RevisionResult]:
    """Make revisions in `workers` processes and yield each result when it is ready. Raises WorkerLostError."""
    # threads and torch do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_initialize_worker)
    try:
        making = [pool.submit(make_revision, revision, out, options, our_logits) for revision in revisions]
        for done in as_completed(making):
            yield done.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise WorkerLostError(
            f"one of {workers} workers was killed, most likely for memory; what is released stays: run it again with"
            " fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # after an interruption, workers are still running
        for process in multiprocessing.active_children():
            process.terminate()


def _initialize_worker() -> None:
    """Prepare a worker before its first revision."""
    serve_parent()
    keep_freed_memory()
    # Megatron-Core and torch print long warnings about optional features; `ettin` silences them too
    warnings.filterwarnings("ignore", module=r"(megatron\.|torch\.|transformers\.|megatron_ettin\.platform\.cpu)")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def source_identity(revision: Revision) -> str:
    """Return a digest that identifies the content of a revision's checkpoint.

    It is the sha256 of integrity.json, which holds the sha256 of every file. A revision of the initial weights has no
    checkpoint, so its digest is that of the seed, the shape and the other keys that decide the weights.

    Raises:
        UserError: integrity.json is not readable.
    """
    if revision.checkpoint is None:
        run, model = revision.run.config, revision.run.config.model
        shape = (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads)
        drawn = (run.run.seed, *shape, model.vocab_size, model.init_std, model.output_bias_init)
        return hashlib.sha256(f"initial {drawn} {run.precision.name}".encode()).hexdigest()
    path = revision.checkpoint / INTEGRITY
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror or error})") from None


def expected_record(revision: Revision, options: ReleaseOptions) -> dict[str, Any]:
    """Return the content that the revision's release.json should have, without the list of files."""
    return {
        **{"format": FORMAT, "revision": revision.name, "phase": revision.phase, "step": revision.step},
        **{"tokens": revision.tokens, "total_tokens": revision.total_tokens, "source": source_identity(revision)},
        **{"name": options.name, "dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes},
        "licence": options.licence,
    }


def write_record(folder: Path, expected: dict[str, Any]) -> None:
    """Write release.json of a finished folder: `expected` and the list of its files. Sync all files to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    (folder / RECORD).write_text(json.dumps({**expected, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (*paths, folder / RECORD, folder):
        fsync(path)


def read_record(folder: Path) -> dict[str, Any]:
    """Return release.json of a revision's folder; empty if there is none or it is unreadable."""
    record = read_json_object(folder / RECORD)
    return record if isinstance(record.get("files"), dict) else {}


def is_complete(folder: Path, record: dict[str, Any], checksums: bool) -> bool:
    """Return whether every file of the record exists with its size and, if `checksums` is set, with its sha256."""
    for name, entry in record["files"].items():
        path = path_in(folder, name, folder / RECORD, nested=True)
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if checksums and sha256(path) != entry["sha256"]:
            return False
    return True


def is_released(folder: Path, expected: dict[str, Any], checksums: bool) -> bool:
    """Return whether `folder` is the expected revision, verified against transformers, and complete."""
    record = read_record(folder)
    same = bool(record) and {key: record.get(key) for key in expected} == expected
    return same and "parity.json" in record["files"] and is_complete(folder, record, checksums)
