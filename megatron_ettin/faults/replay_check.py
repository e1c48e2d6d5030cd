"""Is it the data or the machine? The forward pass of a bad step run twice, the outputs of every layer compared bit by
bit: the same inputs and weights give the same bits on a device that is sound."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_ettin.batching.batches import Batches
from megatron_ettin.parallel.failure_report import raise_on_all
from megatron_ettin.train.setup import Machine
from megatron_ettin.train.step import run_micro_batches

Digest = tuple[int, int, int]  # micro-batch, layer (from 0, of the whole model), sum of the bits of its output
Difference = tuple[int, int]  # micro-batch, layer


class SilentCorruption(RuntimeError):
    """A rank computes other bits from the same ones."""


def recheck(machine: Machine, batches: Batches, step: int) -> str:
    """What two more forward passes of `step` (from 0) say. Collective; the same on every rank. Raises SilentCorruption
    naming the rank whose layer came out differently first."""
    first, second = (digests(machine, batches, step) for _ in range(2))
    found: list[Any] = [None] * machine.layout.topology.world
    mine = (socket.gethostname(), first_difference(first, second))
    if len(found) > 1:
        dist.all_gather_object(found, mine)
    else:
        found = [mine]
    differences = [(where, rank, host) for rank, (host, where) in enumerate(found) if where is not None]
    if not differences:
        return "computed twice more, all ranks have the same bits: look at the data and the learning rate"
    earliest = min(where for where, _, _ in differences)  # what comes after it has wrong inputs
    named = {rank: f"rank {rank} on {host}" for where, rank, host in differences if where == earliest}
    micro_batch, layer = earliest
    error = SilentCorruption(
        f"step {step + 1}, computed twice more: the output of layer {layer} for micro-batch {micro_batch} has other"
        f" bits the second time on {', '.join(named.values())}; suspect that hardware"
    )
    raise_on_all(error, named, machine.layout.rank)


def first_difference(first: list[Digest], second: list[Digest]) -> Difference | None:
    """Where two passes part."""
    pairs = zip(first, second, strict=True)
    return min(((a[0], a[1]) for a, b in pairs if a != b), default=None)


def digests(machine: Machine, batches: Batches, step: int) -> list[Digest]:
    """Of this rank's layers in one forward pass of a step, in the order in which they were computed. Collective."""
    found: list[Digest] = []
    machine.settle()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for chunk in machine.chunks:
            for layer in chunk.transformer.layers:
                stack.enter_context(_noting(layer, found))
        count = batches.micro_batch_count(step)
        run_micro_batches(machine, batches.step(step), count, training=False).read()
    return found


@contextlib.contextmanager
def _noting(layer: Any, found: list[Digest]) -> Iterator[None]:
    passes = 0

    def note(module: Any, inputs: Any, output: Any) -> None:
        nonlocal passes
        hidden = output[0] if isinstance(output, tuple) else output
        found.append((passes, layer.layer_number - 1, sum_of_bits(hidden)))
        passes += 1

    handle = layer.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def sum_of_bits(tensor: torch.Tensor) -> int:
    """Of all elements' bit patterns as integers, modulo 2**64; equal for tensors with the same bits."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))
