"""Replay a step whose figures are anomalous, to tell silent data corruption from a bad batch.

The check runs the step's forward pass twice more and compares the outputs of every layer bit by bit: the same inputs
and weights give the same bits on a device that is sound. consistency.py compares weights between ranks.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ettin.batching.batches import Batches
from megatron_ettin.faults.consistency import sum_of_bits
from megatron_ettin.parallel.collectives import all_gather_object
from megatron_ettin.parallel.failure_report import raise_on_all
from megatron_ettin.train.setup import TrainState
from megatron_ettin.train.step import run_micro_batches

# micro-batch, layer (from 0, of the whole model), sum of the bits of its output
Digest = tuple[int, int, int]
# micro-batch, layer
Difference = tuple[int, int]


class SilentDataCorruptionError(RuntimeError):
    """A rank computed other bits from the same inputs."""


def replay_check(train_state: TrainState, batches: Batches, step: int) -> str:
    """Run the forward pass of `step` (from 0) twice and return a line, the same on every rank (collective).

    Raises SilentDataCorruptionError naming the ranks whose layer differed first.
    """
    first, second = (digests(train_state, batches, step) for _ in range(2))
    ranks = all_gather_object((socket.gethostname(), first_changed_layer(first, second)))
    differences = [(where, rank, host) for rank, (host, where) in enumerate(ranks) if where is not None]
    if not differences:
        return "computed twice more, all ranks have the same bits: look at the data and the learning rate"
    # the layers after it have wrong inputs
    earliest = min(where for where, _, _ in differences)
    named = {rank: f"rank {rank} on {host}" for where, rank, host in differences if where == earliest}
    micro_batch, layer = earliest
    error = SilentDataCorruptionError(
        f"step {step + 1}, computed twice more: the output of layer {layer} for micro-batch {micro_batch} has other"
        f" bits the second time on {', '.join(named.values())}; suspect that hardware"
    )
    raise_on_all(error, named, train_state.layout.rank)


def first_changed_layer(first: list[Digest], second: list[Digest]) -> Difference | None:
    """Return the first layer whose output differs between two passes; None where all agree."""
    pairs = zip(first, second, strict=True)
    return min(((a[0], a[1]) for a, b in pairs if a != b), default=None)


def digests(train_state: TrainState, batches: Batches, step: int) -> list[Digest]:
    """Return the digests of this rank's layers in one forward pass of a step, in order (collective)."""
    layers: list[Digest] = []
    train_state.finish_param_sync()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for chunk in train_state.model_chunks:
            for layer in chunk.transformer.layers:
                stack.enter_context(_recording(layer, layers))
        count = batches.host.count(step)
        run_micro_batches(train_state, batches.step(step), count, training=False).read()
    return layers


@contextlib.contextmanager
def _recording(layer: Any, digests: list[Digest]) -> Iterator[None]:
    passes = 0

    def note(module: Any, inputs: Any, output: Any) -> None:
        nonlocal passes
        hidden = output[0] if isinstance(output, tuple) else output
        digests.append((passes, layer.layer_number - 1, sum_of_bits(hidden)))
        passes += 1

    handle = layer.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
