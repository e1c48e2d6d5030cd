"""What was asked of `ettin prepare`, checked, and the hash by which a finished dataset knows its request."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.config.errors import UserError, nearest
from megatron_ettin.data.ingest.chunking import ChunkRule
from megatron_ettin.data.ingest.input_file import InputFile
from megatron_ettin.data.tokenizer import Tokenizer

EXECUTORS = ("local", "slurm", "ray")
INGEST_VERSION = 1  # raise it when the same input would give other tokens or chunks


@dataclass(frozen=True)
class PrepareRequest:
    inputs: tuple[str, ...]
    out: Path
    rule: ChunkRule
    tokenizer: str = "ettin"
    format: str = "auto"
    text_key: str = "text"
    id_key: str = "id"
    holdout: float = 0.0
    workers: int = 1
    seq_lens: tuple[int, ...] = ()
    add_prefix_space: bool = True
    tokens_key: str = "input_ids"
    tokens_first: bool = False  # where an input has both columns, take the tokens
    executor: str = "local"  # of EXECUTORS
    replan: bool = False
    wait: bool = False  # slurm: until the dataset is there
    slurm_time: str = "24:00:00"
    slurm_partition: str | None = None
    slurm_arguments: tuple[tuple[str, str], ...] = ()  # more options of sbatch


def check_request(request: PrepareRequest) -> None:
    if not 0 <= request.holdout < 1:
        raise UserError(f"--holdout: {request.holdout}; a fraction of the documents, 0 to below 1")
    if "://" in str(request.out) or ":/" in str(request.out):
        raise UserError(f"--out: {request.out} is a URL; datasets are made in a local directory")
    if request.executor not in EXECUTORS:
        hint = nearest(request.executor, EXECUTORS)
        raise UserError(f"--executor: {request.executor!r}{hint}; allowed: {', '.join(EXECUTORS)}")
    if request.workers < 1:
        raise UserError(f"--workers: {request.workers}; at least 1")
    for seq_len in request.seq_lens:
        if seq_len < request.rule.chunk_tokens:
            raise UserError(
                f"--seq-len: rows of {seq_len} tokens cannot hold chunks of --chunk-tokens {request.rule.chunk_tokens}"
            )


def settings_of(request: PrepareRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the output, besides the inputs."""
    return {
        "version": INGEST_VERSION,
        "tokenizer": tokenizer.fingerprint,
        **asdict(request.rule),
        "add_prefix_space": request.add_prefix_space,
        "holdout": request.holdout,
        "text_key": request.text_key,
        "id_key": request.id_key,
        "tokens_key": request.tokens_key,
        "tokens_first": request.tokens_first,
    }


def hash_of_settings(settings: dict[str, Any], files: list[InputFile]) -> str:
    """By which a finished dataset knows the same request: settings, names and sizes. Times are left out: a copy of the
    inputs makes the same dataset."""
    listed = [[file.name, file.source, file.kind, file.compression, file.bytes, file.detail] for file in files]
    return hashlib.sha256(json.dumps([settings, listed], sort_keys=True).encode("utf-8")).hexdigest()
