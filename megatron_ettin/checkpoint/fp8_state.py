"""Scales of FP8 runs with delayed scaling inside checkpoints: `fp8_scales.<linear>.{forward,backward}.<name>`, plain
fp32 tensors that any layout reads and other precisions leave aside."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config
from megatron_ettin.parallel.layout import Layout
from megatron_ettin.platform.fp8_scales import delayed_scales, make_delayed_scales

PREFIX = "fp8_scales."


def keeps_scales(config: Config) -> bool:
    """Whether a run has scales that outlive a step."""
    return PRECISIONS[config.precision.name].fp8_recipe == "delayed"


def stored_scales(checkpoint: Path) -> set[str]:
    """Names of the scales in a checkpoint: none where another precision wrote it."""
    return {key for key in CheckpointReader(checkpoint).keys() if key.startswith(PREFIX)}  # noqa: SIM118


def scales_in_use(
    chunks: Sequence[Any], model_state: dict[str, Any], wanted: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Name -> tensor of this rank's linears; writing to one sets it. `wanted`, to load: the names that the checkpoint
    has; linears of these get their tensors where they have none yet."""
    keys = {
        id(entry.data): entry.key
        for tensors in model_state.values()
        for entry in tensors.values()
        if hasattr(entry, "data")
    }
    found: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        for prefix, linear in _linears(chunk, keys):
            if wanted is not None and any(key.startswith(f"{prefix}.") for key in wanted):
                make_delayed_scales(linear, chunk.config)
            found |= {f"{prefix}.{name}": tensor for name, tensor in delayed_scales(linear).items()}
    return found if wanted is None else {key: tensor for key, tensor in found.items() if key in wanted}


def sharded(scales: dict[str, torch.Tensor], layout: Layout) -> dict[str, ShardedTensor]:
    """For core's checkpoints: each whole, written by one rank of those that have it."""
    replica = (layout.tp_rank, layout.cp_rank, layout.dp_rank)
    return {key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica) for key, tensor in scales.items()}


def _linears(chunk: Any, keys: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """(prefix of its scales' names, module): named after the canonical name of its weight, whichever stage has it."""
    for module in chunk.modules():
        weight = keys.get(id(getattr(module, "weight", None)))
        if weight is not None and hasattr(module, "fp8_meta"):
            yield f"{PREFIX}{weight.removesuffix('.weight')}", module
