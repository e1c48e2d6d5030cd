"""Saving and loading a run's state under any layout with core's dist_checkpointing (format torch_dist).

Model, optimizer and progress become sharded tensors under canonical names; core writes each once and reads back what
the present layout needs. Core's own linears would add empty pickled `_extra_state` entries: they are left out, because
reading them back would unpickle without checks, and nothing is stored that needs it."""

from __future__ import annotations

import contextlib
import logging
import queue
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.reader import common_strategy, load_strategy
from megatron_ettin.checkpoint.writer import Plan


def sharding_metadata(dp_group: Any) -> dict[str, Any]:
    """What core's sharded_state_dict functions are told: layers differ (layer 0 has no norm)."""
    return {
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "dp_cp_group": dp_group,
    }


def model_state(chunks: Sequence[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors of this rank's model chunks, keyed `model0`, `model1`, ... for loading back."""
    state = {f"model{i}": chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    for tensors in state.values():
        for key in [key for key in tensors if key.endswith("_extra_state")]:
            del tensors[key]
    return state


def plan_state(path: Path, model: dict[str, Any], optimizer: Any, progress: dict[str, Any]) -> Plan:
    """Plan what each rank writes into the existing empty folder `path`; rank 0 writes `progress`. Collective; raises
    OSError when the disk refuses."""
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
    """Core's strategy up to the point where it would write."""

    planned: tuple[Any, Any]

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.planned = writer, planned[1]
        return AsyncRequest(None, (), [])


def storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses of the memory behind them."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def load_state(path: Path, model: dict[str, Any], optimizer: Any = None) -> dict[str, Any]:
    """Read `path` into the layout that the sharded tensors describe. Collective.

    Returns {"model0": ..., "optimizer": ..., "progress": ...}. Raises UserError naming the checkpoint where a tensor
    is missing or has another shape."""
    wanted = {**model, "progress": {}}
    if optimizer is not None:
        wanted["optimizer"] = optimizer
    try:
        with _quiet():
            return dist_checkpointing.load(wanted, str(path), load_strategy(), common_strategy())
    except (KeyError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint {path}: does not fit this model ({cause[:300]})") from error


def put_model_state(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copy loaded weights into the model chunks."""
    for i, chunk in enumerate(chunks):
        missing, _ = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state")]
        if lost:
            raise UserError(f"checkpoint: no weights for {', '.join(lost[:3])}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Core and torch warn at length about what is chosen on purpose here."""
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
