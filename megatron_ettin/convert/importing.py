"""Write a model from a Hugging Face folder or a file of the original trainer as a weights-only checkpoint.

Weights are stored in float32 whatever their type was: widening is exact, and training starts from float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import seal_and_rename
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import Config, ModelConfig
from megatron_ettin.config.tables import published_size
from megatron_ettin.convert.folders import resolve_output, staging_dir
from megatron_ettin.convert.rules import TIED, WeightMapping
from megatron_ettin.convert.safetensors_file import ModelFiles, read_ahead

if TYPE_CHECKING:
    from megatron_ettin.convert.composer.weights import TrainerWeights

Report = Callable[[int, int], None]
"""Arguments: number of tensors done, number of all tensors."""


@dataclass(frozen=True)
class ModelImport:
    """Model to write as a checkpoint."""

    files: ModelFiles | TrainerWeights
    """Reader of its weights by their Hugging Face names."""
    model: ModelConfig
    objective: str
    """Objective to import it with: mlm or clm."""
    mappings: list[WeightMapping]
    """All tensors in file order; the embedding is the first."""
    notes: list[str]
    """Assumptions that were made, as lines for the user."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Entries of the checkpoint's progress besides step and tokens, which are 0."""

    def check(self, config_source: str, optional: Collection[str] = ()) -> None:
        """Check that the files hold exactly the model's tensors, with their shapes and a readable type.

        Args:
            config_source: name of the configuration that gives the shapes, for messages.
            optional: names of tensors that may be missing.

        Raises:
            UserError: naming the first tensor that is unknown, missing, of another shape or type, or not tied.
        """
        path, held, shown = self.files.path, self.files.tensors, self.files.display_name
        expected = {name: mapping for mapping in self.mappings for name in mapping.hf_names}
        unknown = sorted(set(held) - set(expected) - {TIED})
        if unknown:
            raise UserError(f"{path}: holds {shown(unknown[0])}, which our model does not have")
        for name, mapping in expected.items():
            if name not in held:
                if name in optional:
                    continue
                raise UserError(f"{path}: lacks {name}, which {config_source} asks for")
            stored = held[name]
            if stored.shape != mapping.hf_shape:
                source = f"the vocabulary of {config_source}" if mapping.transform.may_be_padded else config_source
                raise UserError(f"{path}: {shown(name)} is {stored.shape}, but {source} asks for {mapping.hf_shape}")
            if stored.dtype not in self.files.dtypes:
                raise UserError(f"{path}: {shown(name)} is {stored.dtype}; allowed: {', '.join(self.files.dtypes)}")
        if TIED in held and not self._is_tied():
            raise UserError(f"{path}: {shown(TIED)} differs from the embedding; our output weight is tied to it")

    def _is_tied(self) -> bool:
        """Return whether the stored output weight holds the embedding's values."""
        output, embedding = self.files.tensors[TIED], self.mappings[0].hf_names[0]
        if output.shape != self.mappings[0].hf_shape or output.dtype not in self.files.dtypes:
            return False
        return torch.equal(self.files.read(TIED), self.files.read(embedding))

    def write(
        self, out: Path, import_tokenizer: Callable[[Path], int | None], no_tokenizer: str, report: Report | None
    ) -> dict[str, Any]:
        """Write the new checkpoint folder `out`.

        Args:
            out: the checkpoint's folder.
            import_tokenizer: makes the tokenizer's folder and returns its number of ids; returns None without one.
            no_tokenizer: the note for a model without a tokenizer.
            report: called after each tensor with (tensors done, tensors in all).

        Returns:
            Summary with the keys source, out, objective, size, tensors and notes.

        Raises:
            UserError: `out` is not free, or the tokenizer has more ids than the vocabulary has rows.
        """
        notes = list(self.notes)
        with staging_dir(out) as staging:
            tokens = import_tokenizer(staging / "tokenizer")
            if tokens is None:
                notes.append(no_tokenizer)
            elif tokens > self.model.vocab_size:
                raise UserError(
                    f"{self.files.path}: the tokenizer has {tokens:,} ids, the model's vocabulary"
                    f" {self.model.vocab_size:,} rows"
                )
            config, progress = imported_config(self.model, self.objective), {"step": 0, "tokens": 0, **self.progress}
            write_checkpoint(staging, resolve_output(out), self._tensors(report), config, progress)
        size = published_size(self.model)
        return {
            **{"source": str(self.files.path), "out": str(out), "objective": self.objective, "size": size},
            **{"tensors": len(self.mappings), "notes": notes},
        }

    def _tensors(self, report: Report | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield canonical names and float32 tensors."""

        def read(mapping: WeightMapping) -> torch.Tensor:
            parts = [self.files.read(name).to(torch.float32) for name in mapping.hf_names]
            return mapping.transform.merge(parts, self.model)

        if self.files.reads_ahead:
            pieces = read_ahead(self.mappings, lambda mapping: 4 * math.prod(mapping.shape), read)
        else:
            pieces = ((mapping, read(mapping)) for mapping in self.mappings)
        for done, (mapping, tensor) in enumerate(pieces, start=1):
            yield mapping.name, tensor
            if report is not None:
                report(done, len(self.mappings))


def imported_config(model: ModelConfig, objective: str) -> Config:
    """Return a complete configuration for imported weights, in phase `imported`.

    All other groups come from the recipe of the model's size, or of 17m for an unpublished shape.
    """
    size = published_size(model)
    base = recipe(size or "17m", objective, "pretrain")
    names = {"run.size": size or "custom", "run.phase": "imported", "run.tokens": 0}
    imported = base.with_keys({**names, "data.seq_len": model.max_position_embeddings})
    return dataclasses.replace(imported, model=model)


def write_checkpoint(
    staging: Path,
    final: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Config,
    progress: dict[str, Any],
) -> None:
    """Write a weights-only checkpoint and rename it to its name.

    Args:
        staging: existing folder to write in; it may hold a tokenizer.
        final: the checkpoint's folder, which the staging folder becomes.
        tensors: (canonical name, tensor) pairs.
        config: content of config.yaml.
        progress: content of progress.json.
    """
    known = write_weights(staging, tensors, {"progress": progress})
    (staging / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
    (staging / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    seal_and_rename(staging, final, known)
