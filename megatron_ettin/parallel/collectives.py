"""Run collectives over all ranks: on scalars, on picklable objects, and for decisions that one rank takes for all.

With one rank, or before there is a process group, each returns this process's own value. Every function is collective:
all ranks call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def world_size() -> int:
    """Return the number of ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sum of each value over all ranks, in fp64. A rank whose value should not count passes 0.

    Args:
        values: the values to sum; every rank passes the same number of them.
        device: a device whose tensors the process group's backend reduces.
    """
    vector = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(vector)
    return vector.tolist()


def all_gather_object(value: Value) -> list[Value]:
    """Return every rank's picklable value, by rank."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Value) -> Value:
    """Return rank 0's picklable value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank_zero(function: Callable[[], Value], *caught: type[Exception]) -> Value:
    """Call a function on rank 0 alone and return its result on every rank.

    Args:
        function: the function, without arguments.
        caught: errors that every rank raises if `function` raises them. Any other error is raised on rank 0 alone.
    """
    returned: list[Value] = []
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            returned.append(function())
        except caught as error:
            failure = error
    returned, failure = broadcast_object((returned, failure))
    if failure is not None:
        raise failure
    return returned[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
