"""A checkpoint as conversion sees it: its model, its objective, and its weights by canonical name, without padding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.checkpoint.directory import read_config, read_progress, resolve, verify
from megatron_ettin.checkpoint.reading import CheckpointReader
from megatron_ettin.config.errors import UserError
from megatron_ettin.config.objectives import OBJECTIVES
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.convert.rules import Pair, pairs


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
    """An opened, verified checkpoint of a checkpoint or run directory."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = resolve(path)
        verify(self.checkpoint)
        config_path = self.checkpoint / "config.yaml"
        groups = read_config(self.checkpoint)
        self.run: dict[str, Any] = groups.get("run") or {}
        self.objective = str(self.run.get("objective"))
        if self.objective not in OBJECTIVES:
            raise UserError(f"{config_path}: run.objective is {self.objective!r}; allowed: {', '.join(OBJECTIVES)}")
        self.model = model_config(groups, config_path)
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
    def tokenizer(self) -> Path:
        return self.checkpoint / "tokenizer"

    def read(self, pair: Pair) -> torch.Tensor:
        """One of ours, without the rows that tensor parallelism padded."""
        return self._reader.read(pair.ours)[: pair.shape[0]]
