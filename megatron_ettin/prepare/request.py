"""Check a request of `ettin prepare`, and hash it, so that a finished dataset recognises the same request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_json
from megatron_ettin.base.parsing import load_json, with_digest
from megatron_ettin.data.manifest import FILE_NAME, INPUTS_FILE
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.chunking import ChunkRule
from megatron_ettin.prepare.input_file import InputFile

# raise it when the same input would give other tokens or chunks
INGEST_VERSION = 1


@dataclass(frozen=True)
class PrepareRequest:
    """Options of `ettin prepare`; docs/prepare.md explains them."""

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
    tokens_first: bool = False
    """Read the token column if an input has both a text and a token column."""
    executor: str = "local"
    """`local`, `slurm` or `ray`."""
    replan: bool = False
    accept_copied: bool = False
    """Accept a finished dataset whose inputs had the same names and sizes but other times of change."""
    wait: bool = False
    """With SLURM: return only when the dataset is published."""
    slurm_time: str = "24:00:00"
    slurm_partition: str | None = None
    slurm_arguments: tuple[tuple[str, str], ...] = ()
    """Further options of sbatch."""

    @property
    def work(self) -> Path:
        """Return the folder of the unfinished dataset, with tasks/ and tokenizer/."""
        return work_folder(self.out)


def check_request(request: PrepareRequest) -> PrepareRequest:
    """Return the request with `out` resolved. Raises UserError if an option is not valid."""
    if not 0 <= request.holdout < 1:
        raise UserError(f"--holdout: {request.holdout}; a fraction of the documents, 0 to below 1")
    if "://" in str(request.out) or ":/" in str(request.out):
        raise UserError(f"--out: {request.out} is a URL; datasets are made in a local directory")
    if request.workers < 1:
        raise UserError(f"--workers: {request.workers}; at least 1")
    for seq_len in request.seq_lens:
        if seq_len < request.rule.chunk_tokens:
            raise UserError(
                f"--seq-len: rows of {seq_len} tokens cannot hold chunks of --chunk-tokens {request.rule.chunk_tokens}"
            )
    return replace(request, out=resolved_output(request.out))


def resolved_output(out: Path) -> Path:
    """Return the path of the dataset, links followed. It is checked before the work begins.

    Raises:
        UserError: a rename could not publish the dataset at this path.
    """
    if not out.name and out == Path():
        raise UserError("--out: is the current directory; name a new one in it")
    try:
        resolved = out.resolve()
        os.fsencode(resolved).decode("utf-8")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(work_folder(resolved))
    except UnicodeDecodeError:
        raise UserError(f"--out {os.fsencode(out)!r}: the name is not UTF-8") from None
    except (OSError, RuntimeError) as error:
        # a link to itself raises RuntimeError
        raise UserError(f"--out {out!s:.80}: {getattr(error, 'strerror', None) or error}") from None
    if not (resolved / FILE_NAME).is_file() and (resolved == Path.cwd() or os.path.ismount(resolved)):
        what = "a mount point" if os.path.ismount(resolved) else "the current directory"
        raise UserError(f"--out {out}: is {what}; name a new directory in it")
    return resolved


def work_folder(out: Path) -> Path:
    """Return the folder of an unfinished dataset. It has the same parent as `out`, so that a rename can publish it."""
    return out.parent / f".tmp-{out.name}"


def settings_of(request: PrepareRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that decide the output, besides the inputs.

    They have `vocab_size` only if some ids are unused: for such a tokenizer earlier versions wrote other ids.
    """
    holes = {"vocab_size": tokenizer.vocab_size} if tokenizer.has_holes else {}
    return {
        **holes,
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
    """Return the sha256 of settings and inputs. A finished dataset with the same hash has the same request.

    It covers names, formats and sizes of the inputs. It does not cover times of change, because a copy of the inputs
    makes the same dataset; `rewritten_input` compares times.
    """
    listed = [[file.name, file.source, file.format, file.compression, file.bytes, file.detail] for file in files]
    return hashlib.sha256(json.dumps([settings, listed], sort_keys=True).encode("utf-8")).hexdigest()


def write_inputs(folder: Path, files: list[InputFile]) -> None:
    """Write names, sizes and times of the inputs to the dataset's folder. Times reveal a file that was rewritten."""
    listed = [[file.name, file.bytes, file.modified] for file in files]
    write_json(folder / INPUTS_FILE, with_digest({"version": 1, "files": listed}))


def rewritten_input(folder: Path, files: list[InputFile]) -> tuple[bool, InputFile | None]:
    """Return (whether the dataset has its inputs' times, the first input with another time, or None)."""
    try:
        raw = load_json((folder / INPUTS_FILE).read_text(encoding="utf-8"))
        before = [str(modified) for _, _, modified in raw["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False, None
    if len(before) != len(files):
        return False, None
    pairs = zip(files, before, strict=True)
    return True, next((file for file, time in pairs if time and file.modified and time != file.modified), None)
