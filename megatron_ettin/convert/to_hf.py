"""Export a checkpoint as a folder that transformers' Auto classes load.

Tensors are read a few ahead and written one after the other, whatever parallel layout trained them. The model's weights
are exported, not the optimizer's fp32 master weights, so that the exported model is the one that computed the training
loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.digests import sha256
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import fsync, publish_folder
from megatron_ettin.checkpoint.integrity import INTEGRITY
from megatron_ettin.convert.folders import resolve_output, staging_dir
from megatron_ettin.convert.hf_config import WRITTEN_FOR, reader_notes, to_hf_config
from megatron_ettin.convert.importing import Report
from megatron_ettin.convert.model_card import CardInfo, model_card
from megatron_ettin.convert.safetensors_file import TensorSpec, write_model
from megatron_ettin.convert.source import SourceCheckpoint, cross_notes
from megatron_ettin.convert.tokenizer_files import export_tokenizer, special_ids
from megatron_ettin.convert.verify import Logits, check_export

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "bf16": "bfloat16"}
"""Short name of a type -> long name."""


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export. Raises UserError for a value that cannot be used."""

    dtype: str = "float32"
    """Type of the exported weights: float32, bfloat16, fp32 or bf16."""
    objective: str | None = None
    """mlm or clm, to export an encoder as a decoder or the reverse; None: as it was trained."""
    max_shard_bytes: int = 5_000_000_000
    """Largest size of a safetensors file."""
    verify: bool = False
    """Compare tensors with the checkpoint and, given `our_logits`, logits with transformers before publishing."""
    our_logits: Logits | None = None
    """Computes the logits of this package's model, for the comparison; None: compare no logits."""
    info: CardInfo = field(default_factory=CardInfo)
    """Facts for the model card that the checkpoint does not record."""

    def __post_init__(self) -> None:
        if self.dtype_name not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r}; allowed: {', '.join([*DTYPES, *SHORT])}")
        if self.max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes: {self.max_shard_bytes}; must be at least 1")

    @property
    def dtype_name(self) -> str:
        """Return the long name of `dtype`: float32 or bfloat16."""
        return SHORT.get(self.dtype, self.dtype)


def to_hf(
    checkpoint: Path, out: Path, options: ExportOptions = ExportOptions(), report: Report | None = None
) -> dict[str, Any]:
    """Export a checkpoint to the new folder `out`.

    Args:
        checkpoint: a checkpoint or a run directory (its latest).
        out: the folder to make.
        options: what to export, and how.
        report: called with (tensors done, tensors in all).

    Returns:
        Summary with the keys checkpoint, out, objective, dtype, step, files, tokenizer, parity and notes.

    Raises:
        UserError: the checkpoint is not usable, or `out` is not free.
        ParityError: tensors or logits of the export differ from the checkpoint's.
    """
    dtype = options.dtype_name
    source = SourceCheckpoint(checkpoint, options.objective)
    with staging_dir(out) as staging:
        try:
            files = _write_model(source, staging, options, report)
            ends_with_sep = source.progress.get("end_token") != "none"
            has_tokenizer = export_tokenizer(
                source.tokenizer, staging, source.objective, source.trained_length, ends_with_sep
            )
            parity = check_export(source, staging, DTYPES[dtype], options.our_logits) if options.verify else None
        except UserError:
            # if the cause is a damaged file, report its checksum rather than the error that followed
            source.check_weights()
            raise
        source.check_weights()
        if parity is not None:
            if source.progress.get("step"):
                # `ettin report` finds the export of a checkpoint by this digest; initial weights have no step
                parity["source"] = sha256(source.checkpoint / INTEGRITY)
            (staging / "parity.json").write_text(json.dumps(parity, indent=1) + "\n", encoding="utf-8")
        card = model_card(source, dtype, has_tokenizer, parity, options.info)
        (staging / "README.md").write_text(card, encoding="utf-8")
        for path in (*staging.iterdir(), staging):
            fsync(path)
        publish_folder(staging, resolve_output(out))
    return {
        **{"checkpoint": str(source.checkpoint), "out": str(out), "objective": source.objective, "dtype": dtype},
        **{"step": source.progress.get("step"), "files": files, "tokenizer": has_tokenizer, "parity": parity},
        "notes": [*reader_notes(source.model, source.objective), *cross_notes(source)],
    }


def _write_model(source: SourceCheckpoint, staging: Path, options: ExportOptions, report: Report | None) -> list[str]:
    """Write config.json and the weights. Returns the names of the safetensors files."""
    ids = special_ids(source.tokenizer, source.model.vocab_size, source.special_ids)
    model = dataclasses.replace(source.model, max_position_embeddings=source.trained_length)
    config = to_hf_config(model, source.objective, options.dtype_name, ids)
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if source.objective == "clm":
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {"_from_model_config": True, **ends, "transformers_version": WRITTEN_FOR}
        (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")

    def hf_tensors() -> Iterator[torch.Tensor]:
        for done, (mapping, tensor) in enumerate(source.tensors(), start=1):
            yield from mapping.transform.split(tensor, source.model, len(mapping.hf_names))
            if report is not None:
                report(done, len(source.mappings))

    specs: list[TensorSpec] = [(name, mapping.hf_shape) for mapping in source.mappings for name in mapping.hf_names]
    return write_model(staging, specs, DTYPES[options.dtype_name], hf_tensors(), options.max_shard_bytes)
