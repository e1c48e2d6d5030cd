"""What was asked of `ettin prepare`, checked, and the hash by which a finished dataset knows its request."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.ingest.chunking import ChunkRule
from megatron_ettin.data.ingest.inputs import InputFile
from megatron_ettin.data.tokenizer import Tokenizer

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


def check_request(request: PrepareRequest) -> None:
    if not 0 <= request.holdout < 1:
        raise UserError(f"--holdout: {request.holdout}; a fraction of the documents, 0 to below 1")
    if request.workers < 1:
        raise UserError(f"--workers: {request.workers}; at least 1")
    for seq_len in request.seq_lens:
        if seq_len < request.rule.chunk_tokens:
            raise UserError(
                f"--seq-len: rows of {seq_len} tokens cannot hold chunks of --chunk-tokens {request.rule.chunk_tokens}"
            )


def hash_of_settings(request: PrepareRequest, tokenizer: Tokenizer, files: list[InputFile]) -> str:
    content = {
        "version": INGEST_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "rule": asdict(request.rule),
        "add_prefix_space": request.add_prefix_space,
        "holdout": request.holdout,
        "text_key": request.text_key,
        "id_key": request.id_key,
        "files": [[file.name, file.source, file.kind, file.compression, file.bytes] for file in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()
