"""Describe the distributed optimizer's state as sharded tensors: each rank writes and reads its own shards.

Core's own format that survives a change of layout (`fully_reshardable`) gathers every state on every data-parallel rank
before writing, and reads all of it on each. The files can store boxes of a tensor. A shard is a range of the flattened
parameter, so it consists of a few boxes: the end of its first row, whole rows, the beginning of its last row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_ettin.platform.fp8 import is_fp8

# id of a model's parameter -> this rank's shard of its fp32 master
Masters = dict[int, torch.Tensor]


def sharded_state(core: Any, model_state: dict[str, Any], masters: Masters) -> dict[int, ShardedTensor]:
    """Return masters and moments of this rank's shards, as `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`.

    They are views, so reading into them loads them.

    Args:
        core: a DistributedOptimizer.
        model_state: the sharded tensors of its model chunks.
        masters: tensors to use in place of the optimizer's masters; none if empty.
    """
    entries = entries_by_parameter(model_state)
    sharded = (
        tensor
        for parameter, first, states in local_shards(core)
        for key, flat in (states | ({"param": masters[id(parameter)]} if masters else {})).items()
        for tensor in to_sharded_tensors(entries[id(parameter)], f"optimizer.state.{key}.", flat, first)
    )
    return dict(enumerate(sharded))


def entries_by_parameter(model_state: dict[str, Any]) -> dict[int, Any]:
    """Return the model's sharded tensors by the id of their parameter."""
    return {id(entry.data): entry for entry in nested_values(model_state) if hasattr(entry, "data")}


def empty_masters(core: Any) -> Masters:
    """Return uninitialised tensors to read a checkpoint's masters into, by the id of their parameter.

    Masters are not read in place: in fp32 a master is the weight itself, which is loaded too, perhaps from rounded
    values.
    """
    return {id(parameter): torch.empty_like(states["param"]) for parameter, _, states in local_shards(core)}


def copy_masters(core: Any, masters: Masters) -> None:
    """Copy `masters` to the optimizer's masters on this rank."""
    for parameter, _, states in local_shards(core):
        states["param"].copy_(masters[id(parameter)])


def local_shards(core: Any) -> Iterator[tuple[torch.Tensor, int, dict[str, torch.Tensor]]]:
    """Yield (model parameter, its first element that this rank updates, the rank's flat states by key)."""
    for buffer in core.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    states = core._get_main_param_and_optimizer_states(parameter)
                    flat = {key: tensor.detach().view(-1) for key, tensor in states.items() if key != "step"}
                    yield parameter, ranges["param"].start, flat


def set_master_weights(core: Any, exact: Mapping[int, torch.Tensor]) -> None:
    """Set masters from exact values. `exact`: id of a parameter -> its value in this rank's part of the model."""
    for parameter, first, states in local_shards(core):
        if (value := exact.get(id(parameter))) is not None:
            master = states["param"]
            master.copy_(value.reshape(-1)[first : first + len(master)])


def with_masters(core: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """Return `model_state` with this rank's masters in place of weights stored in FP8.

    They have the type of the other weights, so a checkpoint's weights are not rounded to FP8.
    """
    masters = {id(parameter): (first, states["param"]) for parameter, first, states in local_shards(core)}

    def replaced(name: str, entry: Any) -> dict[str, Any]:
        if not is_fp8(getattr(entry, "data", None)):
            return {name: entry}
        first, master = masters.get(id(entry.data), (0, None))
        parts = [] if master is None else to_sharded_tensors(entry, "", master.to(entry.data.dtype), first)
        return {f"{name}.{number}": part for number, part in enumerate(parts)}

    return {
        chunk: {key: part for name, entry in tensors.items() for key, part in replaced(name, entry).items()}
        for chunk, tensors in model_state.items()
    }


def to_sharded_tensors(entry: Any, prefix: str, flat: torch.Tensor, first: int) -> Iterator[ShardedTensor]:
    """Yield sharded tensors whose data are views of `flat`, which holds a parameter's elements from `first` on.

    Args:
        entry: the parameter's entry in the model's sharded state.
        prefix: beginning of their keys.
        flat: this rank's shard.
        first: index of its first element in the flattened parameter.
    """
    for start, whole in stored_tensors(entry):
        begin, end = max(first, start), min(first + len(flat), start + math.prod(whole.local_shape))
        for offset, shape in shard_boxes(whole.local_shape, begin - start, end - start):
            size = math.prod(shape)
            data = flat[begin - first :][:size].view(shape)
            begin += size
            yield ShardedTensor(
                prefix + whole.key,
                data,
                flat.dtype,
                shape,
                whole.global_shape,
                tuple(a + b for a, b in zip(whole.global_offset, offset, strict=True)),
                # the shards form no regular grid
                None,
                # each data-parallel rank has other elements
                (*whole.replica_id[:2], 0),
            )


def stored_tensors(entry: Any) -> list[tuple[int, ShardedTensor]]:
    """Return (first element, sharded tensor) of each tensor that stores a parameter: two for a gated layer's."""
    if not isinstance(entry, ShardedTensorFactory):
        return [(0, entry)]
    parts = replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()
    return [(part.data.storage_offset(), part) for part in parts]


def shard_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, shape) of the boxes that hold elements [begin, end) of a tensor in row-major order."""
    if end <= begin:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    inner = math.prod(shape[1:])
    row, rest = divmod(begin, inner)
    if rest or end - begin < inner:
        stop = min(end, (row + 1) * inner)
        for offset, box in shard_boxes(shape[1:], rest, stop - row * inner):
            yield (row, *offset), (1, *box)
        yield from shard_boxes(shape, stop, end)
        return
    rows = (end - begin) // inner
    yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from shard_boxes(shape, begin + rows * inner, end)
