"""Open a checkpoint for conversion: its model, its objective, and its weights by canonical name, without padding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import read_config, read_progress, resolve
from megatron_ettin.checkpoint.integrity import check_nothing_else, verify
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import EXPORTED, OBJECTIVES, ROW_OBJECTIVES
from megatron_ettin.convert.rules import WeightMapping, weight_mappings
from megatron_ettin.convert.safetensors_file import read_ahead

WEIGHTS = ".distcp"
"""Suffix of a checkpoint's weight files."""


def check_objective(objective: str) -> str:
    """Return `objective` unchanged. Raises UserError if a model cannot be exported with it."""
    if objective not in EXPORTED:
        raise UserError(f"--objective: {objective!r}; allowed: {', '.join(EXPORTED)}")
    return objective


def model_config(groups: dict[str, Any], path: Path) -> ModelConfig:
    """Build the ModelConfig from the groups of a config.yaml. Raises UserError if the group or a key is missing."""
    group = groups.get("model")
    if not isinstance(group, dict):
        raise UserError(f"{path}: has no group `model`; the shape of the weights is unknown")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        return ModelConfig(**{key: value for key, value in group.items() if key in known})
    except TypeError as error:
        raise UserError(f"{path}: model: {str(error).split('__init__() ')[-1]}") from None


class SourceCheckpoint:
    """A checkpoint opened for conversion, from a checkpoint folder or a run directory (its latest).

    Opening verifies the small files. A thread computes the sha256 of the weights while they are converted;
    `check_weights` waits for it and raises UserError if one is wrong.

    Attributes:
        checkpoint: its folder.
        run: the `run` group of its config.yaml.
        objective: objective to export it with, mlm or clm.
        trained_objective: objective that it was trained with; it may differ from `objective`.
        trained_length: tokens per row in training; for an import, the longest row that its config allows.
        mappings: every tensor, in file order.
    """

    def __init__(self, path: Path, objective: str | None = None) -> None:
        self.checkpoint = resolve(path)
        check_nothing_else(self.checkpoint)
        verify(self.checkpoint, which=lambda name: not name.endswith(WEIGHTS))
        hashing = ThreadPoolExecutor(1, "sha256")
        self._weights = hashing.submit(
            verify, self.checkpoint, which=lambda name: name.endswith(WEIGHTS), background=True
        )
        hashing.shutdown(wait=False)
        config_path = self.checkpoint / "config.yaml"
        groups = read_config(self.checkpoint)
        self.run: dict[str, Any] = groups.get("run") or {}
        self.trained_objective = str(self.run.get("objective"))
        if self.trained_objective not in OBJECTIVES:
            allowed = ", ".join(OBJECTIVES)
            raise UserError(f"{config_path}: run.objective is {self.trained_objective!r}; allowed: {allowed}")
        self.objective = check_objective(objective or OBJECTIVES[self.trained_objective].exports[0])
        self.model = model_config(groups, config_path)
        data = groups.get("data")
        rows = data.get("seq_len") if isinstance(data, dict) else None
        # data.seq_len of a run may be shorter than the model allows; an import sets it to the config's length
        self.trained_length: int = rows if isinstance(rows, int) and rows > 0 else self.model.max_position_embeddings
        self.progress = read_progress(self.checkpoint)
        self._reader = CheckpointReader(self.checkpoint)
        self.mappings = list(weight_mappings(self.model, self.objective))
        self._check()

    def _check(self) -> None:
        """Raise UserError if a tensor is missing or its shape, except for padded rows, is not that of the config."""
        present = set(self._reader.keys())
        for mapping in self.mappings:
            name, shape = mapping.name, mapping.shape
            if name not in present:
                raise UserError(f"{self.checkpoint}: no tensor {name}, which the config's shape asks for")
            stored = self._reader.shape(name)
            rows_fit = stored[:1] >= shape[:1] if mapping.transform.may_be_padded else stored[:1] == shape[:1]
            if len(stored) != len(shape) or stored[1:] != shape[1:] or not rows_fit:
                raise UserError(f"{self.checkpoint}: {name} is {stored}; the config's shape gives {shape}")

    @property
    def special_ids(self) -> dict[str, int]:
        """Return role -> id of special tokens as an import recorded them; empty for a run's checkpoint."""
        recorded = self.progress.get("special_ids")
        return recorded if isinstance(recorded, dict) else {}

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer, which need not exist."""
        return self.checkpoint / "tokenizer"

    def read(self, mapping: WeightMapping) -> torch.Tensor:
        """Read a canonical tensor, without the rows that pad it for tensor parallelism."""
        return self._reader.read(mapping.name)[: mapping.shape[0]]

    def tensors(self) -> Iterator[tuple[WeightMapping, torch.Tensor]]:
        """Return an iterator of (mapping, canonical tensor) in file order; threads read ahead."""

        def bytes_of(mapping: WeightMapping) -> int:
            return math.prod(mapping.shape) * self._reader.dtype(mapping.name).itemsize

        return read_ahead(self.mappings, bytes_of, self.read)

    def check_weights(self) -> None:
        """Wait for the checksums of the weights. Raises UserError with the first damaged file."""
        self._weights.result()


def predicts_next(source: SourceCheckpoint) -> bool:
    """Return whether the export is an encoder that predicts a masked token at the position before it."""
    if source.objective != "mlm":
        return False
    row_objective = OBJECTIVES[source.trained_objective].masked_objective
    return row_objective is None or ROW_OBJECTIVES[row_objective].shifts


def cross_notes(source: SourceCheckpoint) -> list[str]:
    """Return warnings for users of an export whose objective is not the trained one; empty if it is."""
    trained = OBJECTIVES[source.trained_objective]
    if predicts_next(source) and trained.masked_objective is not None:
        return [
            "These weights were trained on masked next-token prediction: position i holds the prediction of token"
            " i + 1, so a masked token is read from the position before it"
        ]
    if source.objective in trained.exports:
        return []
    if source.objective == "mlm":
        return [
            "These weights were trained as a decoder and exported as an encoder: position i holds the prediction of"
            " token i + 1 (masked next-token prediction), so a masked token is read from the position before it, until"
            " the model is trained on as an encoder"
        ]
    return [
        "These weights were trained as an encoder and exported as a decoder: they have never predicted a next token;"
        " train on with `--objective clm` before generating"
    ]
