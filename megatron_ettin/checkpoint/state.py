"""Save and load a run's state under any layout with core's dist_checkpointing (format torch_dist).

Model, optimizer and progress become sharded tensors under canonical names; core writes each once and reads back what
the present layout needs. Core's own linears would add empty pickled `_extra_state` entries: they are left out, because
reading them back would unpickle without checks, and nothing is stored that needs it.

FP8 runs with delayed scaling also store their scales, as `fp8_scales.<linear>.{forward,backward}.<name>`: plain fp32
tensors that any layout reads and other precisions ignore.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.checkpoint.reader import CheckpointReader, common_strategy, load_strategy
from megatron_ettin.checkpoint.writer import Plan
from megatron_ettin.config.schema import PrecisionConfig
from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.parallel.groups import Layout
from megatron_ettin.platform.fp8 import delayed_scales, make_delayed_scales


def model_state(chunks: Sequence[Any], dp_group: Any) -> dict[str, Any]:
    """Return the sharded tensors of this rank's model chunks, keyed `model0`, `model1`, ... for loading back."""
    # layers differ: layer 0 has no norm
    metadata = {"non_homogeneous_layers": True, "singleton_local_shards": False, "dp_cp_group": dp_group}
    state = {f"model{i}": chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    for tensors in state.values():
        for key in [key for key in tensors if key.endswith("_extra_state")]:
            del tensors[key]
    return state


def plan_state(path: Path, model: dict[str, Any], optimizer: Any, progress: dict[str, Any]) -> Plan:
    """Plan what each rank writes into the existing empty folder `path` (collective).

    Rank 0 writes `progress`. Raises OSError when the disk refuses.
    """
    state = {**model, "progress": progress}
    if optimizer is not None:
        state["optimizer"] = optimizer
    # core would start a server process to hold this queue, which outlives a killed rank and keeps its output open
    filesystem_async._results_queue = queue.Queue()
    strategy = _Planning("torch_dist", 1, thread_count=1)
    with _quiet():
        dist_checkpointing.save(state, str(path), strategy, async_sharded_save=True)
    writer, metadata = strategy.planned
    return Plan(path, dist.get_rank(), dist.get_world_size(), writer, metadata)


class _Planning(TorchDistSaveShardedStrategy):
    """Core's save strategy, which keeps the plan in `planned` instead of writing it."""

    planned: tuple[Any, Any]

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.planned = writer, planned[1]
        return AsyncRequest(None, (), [])


def load_state(path: Path, model: dict[str, Any], optimizer: Any = None) -> dict[str, Any]:
    """Read `path` into the layout that the sharded tensors describe (collective).

    Returns {"model0": ..., "optimizer": ..., "progress": ...}. Raises UserError naming the checkpoint if a tensor
    is missing or has another shape.
    """
    wanted = {**model, "progress": {}}
    if optimizer is not None:
        wanted["optimizer"] = optimizer
    try:
        with _quiet():
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path), load_strategy(), common_strategy())
            return loaded
    except (KeyError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        raise UserError(f"checkpoint {path}: does not fit this model ({first_line(error)[:300]})") from error


def put_model_state(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copy loaded weights into the model chunks. Raises UserError if a weight is missing."""
    for i, chunk in enumerate(chunks):
        missing, _ = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state")]
        if lost:
            raise UserError(f"checkpoint: no weights for {', '.join(lost[:3])}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of core and torch in the block; they are about choices that this module makes on purpose."""
    loggers = [logging.getLogger(name) for name in ("megatron.core", "torch.distributed.checkpoint")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


PREFIX = "fp8_scales."


def keeps_scales(precision: PrecisionConfig) -> bool:
    """Return whether a run has FP8 scales that outlive a step (delayed scaling)."""
    return PRECISIONS[precision.name].fp8_recipe == "delayed"


def stored_scales(checkpoint: Path) -> set[str]:
    """Return the names of the FP8 scales in a checkpoint; empty if it was written in another precision."""
    return {key for key in CheckpointReader(checkpoint).keys() if key.startswith(PREFIX)}  # noqa: SIM118


def scales_in_use(
    chunks: Sequence[Any], model_state: dict[str, Any], wanted: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Return the live FP8 scales of this rank's linears by name; writing to a tensor sets the scale.

    Args:
        chunks: this rank's model chunks.
        model_state: their sharded state, which has the canonical names.
        wanted: names in the checkpoint that is loaded. Only these are returned, and their linears get scales if they
            have none yet. None: all scales.
    """
    keys = {
        id(entry.data): entry.key
        for tensors in model_state.values()
        for entry in tensors.values()
        if hasattr(entry, "data")
    }
    scales: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        for prefix, linear in _linears(chunk, keys):
            if wanted is not None and any(key.startswith(f"{prefix}.") for key in wanted):
                make_delayed_scales(linear, chunk.config)
            scales |= {f"{prefix}.{name}": tensor for name, tensor in delayed_scales(linear).items()}
    return scales if wanted is None else {key: tensor for key, tensor in scales.items() if key in wanted}


def sharded(scales: dict[str, torch.Tensor], layout: Layout) -> dict[str, ShardedTensor]:
    """Return the scales for core's checkpoints, each unsharded and written by one of the ranks that have it."""
    replica = (layout.tp_rank, layout.cp_rank, layout.dp_rank)
    return {key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica) for key, tensor in scales.items()}


def _linears(chunk: Any, keys: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """Yield (prefix of its scales' names, linear). The prefix has the weight's canonical name, equal on any layout."""
    for module in chunk.modules():
        weight = keys.get(id(getattr(module, "weight", None)))
        if weight is not None and hasattr(module, "fp8_meta"):
            yield f"{PREFIX}{weight.removesuffix('.weight')}", module
