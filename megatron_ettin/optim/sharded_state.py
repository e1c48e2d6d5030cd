"""The distributed optimizer's state in a checkpoint: each rank writes and reads the parts of parameters that it holds,
as sharded tensors in model space, in place.

Core's own form that survives a change of layout (`fully_reshardable`) gathers every state on every data-parallel rank
before it writes, and reads all of it on each. A shard is a run of a flattened parameter, which is a few rectangles of
the parameter: its first row's end, whole rows, its last row's beginning. The format of the files knows rectangles."""

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

Masters = dict[int, torch.Tensor]  # id of the model's parameter -> this rank's part of its fp32 copy


def sharded_state(core: Any, model_state: dict[str, Any], masters: Masters) -> dict[int, ShardedTensor]:
    """Masters and moments of this rank's shards, as `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`: views, so that
    what is read into them is loaded. `core`: a DistributedOptimizer; `model_state`: its chunks' sharded tensors;
    `masters`: to be used in place of its own."""
    entries = {id(entry.data): entry for entry in nested_values(model_state) if hasattr(entry, "data")}
    found = (
        piece
        for parameter, first, tensors in shards(core)
        for kind, flat in (tensors | ({"param": masters[id(parameter)]} if masters else {})).items()
        for piece in pieces(entries[id(parameter)], f"optimizer.state.{kind}.", flat, first)
    )
    return dict(enumerate(found))


def masters_to_read(core: Any) -> Masters:
    """Room for the masters of a checkpoint. In fp32 a master is the weight itself, which is loaded too, and may have
    been rounded when it was written."""
    return {id(parameter): torch.empty_like(tensors["param"]) for parameter, _, tensors in shards(core)}


def put_masters(core: Any, masters: Masters) -> None:
    for parameter, _, tensors in shards(core):
        tensors["param"].copy_(masters[id(parameter)])


def shards(core: Any) -> Iterator[tuple[torch.Tensor, int, dict[str, torch.Tensor]]]:
    """(model's parameter, first element of it that this rank updates, the rank's flat tensors of it by kind)."""
    for buffer in core.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    tensors = core._get_main_param_and_optimizer_states(parameter)
                    flat = {kind: tensor.detach().view(-1) for kind, tensor in tensors.items() if kind != "step"}
                    yield parameter, ranges["param"].start, flat


def set_master_weights(core: Any, exact: Mapping[int, torch.Tensor]) -> None:
    """Masters of these parameters (id -> value of this rank's part of the model) from values, not from weights."""
    for parameter, first, tensors in shards(core):
        if (value := exact.get(id(parameter))) is not None:
            master = tensors["param"]
            master.copy_(value.reshape(-1)[first : first + len(master)])


def from_masters(core: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """`model_state` with this rank's part of masters in place of the weights that live in FP8, in the type that other
    weights have: what a checkpoint holds of them is not rounded to FP8."""
    masters = {id(parameter): (first, tensors["param"]) for parameter, first, tensors in shards(core)}

    def written(name: str, entry: Any) -> dict[str, Any]:
        if not is_fp8(getattr(entry, "data", None)):
            return {name: entry}
        first, master = masters.get(id(entry.data), (0, None))
        parts = [] if master is None else pieces(entry, "", master.to(entry.data.dtype), first)
        return {f"{name}.{number}": part for number, part in enumerate(parts)}

    return {
        chunk: {key: part for name, entry in tensors.items() for key, part in written(name, entry).items()}
        for chunk, tensors in model_state.items()
    }


def pieces(entry: Any, prefix: str, flat: torch.Tensor, first: int) -> Iterator[ShardedTensor]:
    """Elements `first` and on of the parameter of `entry` as sharded tensors whose data are views of `flat`."""
    for start, whole in wholes(entry):
        begin, end = max(first, start), min(first + len(flat), start + math.prod(whole.local_shape))
        for offset, shape in shard_boxes(whole.local_shape, begin - start, end - start):
            size = math.prod(shape)
            at = begin - first
            begin += size
            yield ShardedTensor(
                prefix + whole.key,
                flat[at : at + size].view(shape),
                flat.dtype,
                shape,
                whole.global_shape,
                tuple(a + b for a, b in zip(whole.global_offset, offset, strict=True)),
                None,  # of no regular grid
                (*whole.replica_id[:2], 0),  # each data-parallel rank has other elements
            )


def wholes(entry: Any) -> list[tuple[int, ShardedTensor]]:
    """(first element, sharded tensor) of what a parameter is in the checkpoint: a gated layer's is two."""
    if not isinstance(entry, ShardedTensorFactory):
        return [(0, entry)]
    parts = replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()
    return [(part.data.storage_offset(), part) for part in parts]


def shard_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of boxes that make up elements `begin` to `end` of a tensor in row-major order, in that order."""
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
