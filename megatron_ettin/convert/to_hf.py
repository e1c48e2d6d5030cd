"""A checkpoint -> a folder that transformers' Auto classes load.

Weights are streamed: tensors are read a few ahead and written one after the other, whatever layout trained them. What
is exported are the model's weights as they are stored (an optimizer's fp32 masters are not used), so the released model
is the one that computed the training loss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync, publish_folder
from megatron_ettin.checkpoint.integrity import INTEGRITY
from megatron_ettin.convert.folders import resolved, staged
from megatron_ettin.convert.hf_config import WRITTEN_FOR, reader_notes, to_hf_config
from megatron_ettin.convert.model_card import model_card
from megatron_ettin.convert.safetensors_file import Entry, write_model
from megatron_ettin.convert.source import Source, cross_notes
from megatron_ettin.convert.tokenizer_files import Form, export_tokenizer, special_ids
from megatron_ettin.convert.verify import Logits, check_export

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "bf16": "bfloat16"}
MAX_SHARD_BYTES = 5_000_000_000
Report = Callable[[int, int], None]  # tensors done, tensors in all
Card = Callable[[Source, str, bool, dict[str, Any] | None], str]  # source, dtype, has a tokenizer, parity record


def to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str = "float32",
    verify: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    our_logits: Logits | None = None,
    report: Report | None = None,
    objective: str | None = None,
    card: Card = model_card,
) -> dict[str, Any]:
    """Export `checkpoint` (or a run's latest) to the new folder `out`. Returns what was written, for people and JSON.

    With `verify`, tensors are read back and, given `our_logits`, logits are compared with transformers' before the
    folder gets its name; the figures are its parity.json. `objective` makes a decoder of an encoder or the reverse."""
    dtype = SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r}; allowed: {', '.join([*DTYPES, *SHORT])}")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes: {max_shard_bytes}; must be at least 1")
    source = Source(checkpoint, objective)
    with staged(out) as staging:
        try:
            files = _write(source, staging, dtype, max_shard_bytes, report)
            form = Form(source.objective, source.trained_length, source.progress.get("end_token") != "none")
            has_tokenizer = export_tokenizer(source.tokenizer, staging, form)
            parity = check_export(source, staging, DTYPES[dtype], our_logits) if verify else None
        except UserError:
            source.check_weights()  # a damaged file is told by its checksum rather than by what it leads to
            raise
        source.check_weights()
        if parity is not None:
            if source.progress.get(
                "step"
            ):  # by which `ettin report` knows it; initial weights are no checkpoint of a run
                parity["source"] = sha256(source.checkpoint / INTEGRITY)
            (staging / "parity.json").write_text(json.dumps(parity, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(card(source, dtype, has_tokenizer, parity), encoding="utf-8")
        for path in staging.iterdir():
            fsync(path)
        fsync(staging)
        publish_folder(staging, resolved(out))
    return {
        **{"checkpoint": str(source.checkpoint), "out": str(out), "objective": source.objective, "dtype": dtype},
        **{"step": source.progress.get("step"), "files": files, "tokenizer": has_tokenizer, "parity": parity},
        "notes": [*reader_notes(source.model, source.objective), *cross_notes(source)],
    }


def _write(source: Source, staging: Path, dtype: str, max_shard_bytes: int, report: Report | None) -> list[str]:
    """config.json and the weights. Returns the names of the safetensors files."""
    ids = special_ids(source.tokenizer, source.model.vocab_size, source.special_ids)
    model = dataclasses.replace(source.model, max_position_embeddings=source.trained_length)
    config = to_hf_config(model, source.objective, dtype, ids)
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if source.objective == "clm":
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {"_from_model_config": True, **ends, "transformers_version": WRITTEN_FOR}
        (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    entries: list[Entry] = [(name, pair.their_shape) for pair in source.pairs for name in pair.theirs]
    return write_model(staging, entries, DTYPES[dtype], _tensors(source, report), max_shard_bytes)


def _tensors(source: Source, report: Report | None) -> Iterator[torch.Tensor]:
    """Theirs in file order."""
    for done, (pair, tensor) in enumerate(source.tensors(), start=1):
        yield from pair.form.split(tensor, source.model, len(pair.theirs))
        if report is not None:
            report(done, len(source.pairs))
