"""A checkpoint as conversion sees it: its model, its objective, and its weights by canonical name, without padding."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import read_config, read_progress, resolve, verify
from megatron_ettin.checkpoint.integrity import check_nothing_else
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import EXPORTED, OBJECTIVES, ROW_OBJECTIVES
from megatron_ettin.convert.rules import Pair, pairs
from megatron_ettin.convert.safetensors_file import read_ahead

WEIGHTS = ".distcp"


def check_objective(objective: str) -> str:
    if objective not in EXPORTED:
        raise UserError(f"--objective: {objective!r}; allowed: {', '.join(EXPORTED)}")
    return objective


def model_config(groups: dict[str, Any], path: Path) -> ModelConfig:
    """The `model` group of a config.yaml. Raises UserError naming what is missing or unknown."""
    group = groups.get("model")
    if not isinstance(group, dict):
        raise UserError(f"{path}: has no group `model`; the shape of the weights is unknown")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        return ModelConfig(**{key: value for key, value in group.items() if key in known})
    except TypeError as error:
        raise UserError(f"{path}: model: {str(error).split('__init__() ')[-1]}") from None


class Source:
    """An opened checkpoint of a checkpoint or run directory. Its small files are verified here; the weights' sha256 are
    computed while they are converted, and `check_weights` raises UserError where one is not what was written.

    `objective` (mlm or clm) is what it becomes, `trained_objective` what it was trained for: weights serve both."""

    def __init__(self, path: Path, objective: str | None = None) -> None:
        self.checkpoint = resolve(path)
        check_nothing_else(self.checkpoint)
        verify(self.checkpoint, which=lambda name: not name.endswith(WEIGHTS))
        hashing = ThreadPoolExecutor(1, "sha256")
        weights = functools.partial(verify, which=lambda name: name.endswith(WEIGHTS), background=True)
        self._weights = hashing.submit(weights, self.checkpoint)
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
        # of imported weights the folder says the length, and of a run its rows, whatever the model had room for
        self.trained_length: int = rows if isinstance(rows, int) and rows > 0 else self.model.max_position_embeddings
        self.progress = read_progress(self.checkpoint)
        self._reader = CheckpointReader(self.checkpoint)
        self.pairs = list(pairs(self.model, self.objective))
        self._check()

    def _check(self) -> None:
        """Every tensor is there with the shape that the config gives it."""
        present = set(self._reader.keys())
        for pair in self.pairs:
            if pair.ours not in present:
                raise UserError(f"{self.checkpoint}: no tensor {pair.ours}, which the config's shape asks for")
            found = self._reader.shape(pair.ours)
            rows_fit = found[:1] >= pair.shape[:1] if pair.form.may_be_padded else found[:1] == pair.shape[:1]
            if len(found) != len(pair.shape) or found[1:] != pair.shape[1:] or not rows_fit:
                raise UserError(f"{self.checkpoint}: {pair.ours} is {found}; the config's shape gives {pair.shape}")

    @property
    def special_ids(self) -> dict[str, int]:
        """What the folder that was imported said of its special tokens; empty for a run's checkpoint."""
        recorded = self.progress.get("special_ids")
        return recorded if isinstance(recorded, dict) else {}

    @property
    def tokenizer(self) -> Path:
        return self.checkpoint / "tokenizer"

    def read(self, pair: Pair) -> torch.Tensor:
        """One of ours, without the rows that tensor parallelism padded."""
        return self._reader.read(pair.ours)[: pair.shape[0]]

    def tensors(self) -> Iterator[tuple[Pair, torch.Tensor]]:
        """All of ours in file order, some read ahead."""
        return read_ahead(self.pairs, self._bytes, self.read)

    def _bytes(self, pair: Pair) -> int:
        return math.prod(pair.shape) * self._reader.dtype(pair.ours).itemsize

    def check_weights(self) -> None:
        """Wait for the checksums. Raises UserError naming the first file that is not what was written."""
        self._weights.result()


def predicts_next(source: Source) -> bool:
    """Whether the encoder that is exported predicts masked tokens at the position before them."""
    if source.objective != "mlm":
        return False
    kind = OBJECTIVES[source.trained_objective].masked_objective
    return kind is None or ROW_OBJECTIVES[kind].shifts


def cross_notes(source: Source) -> list[str]:
    """What a reader must know of a model that was not trained for what it was exported as."""
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
