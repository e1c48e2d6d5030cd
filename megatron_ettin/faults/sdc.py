"""Detect silent data corruption: a replay check of a step, and a weight-hash check across data-parallel replicas.

The replay check runs the forward pass of an anomalous step twice more and compares the outputs of every layer bit by
bit: the same inputs and weights give the same bits on a device that is sound. The weight-hash check compares ranks that
hold the same weights: a flipped bit in one replica trains on, and which replica is saved is chance.
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.layouts import zero_stage
from megatron_ettin.parallel.collectives import all_gather_object
from megatron_ettin.parallel.failure_report import raise_on_all
from megatron_ettin.platform.fp8 import raw_data
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import StepResult
from megatron_ettin.train.setup import TrainState
from megatron_ettin.train.step import run_micro_batches

# micro-batch, layer (from 0, of the whole model), sum of the bits of its output
Digest = tuple[int, int, int]
# micro-batch, layer
Difference = tuple[int, int]


class SilentDataCorruption(RuntimeError):
    """A rank computed other bits from the same inputs."""


def replay_check(train_state: TrainState, batches: Batches, step: int) -> str:
    """Run the forward pass of `step` (from 0) twice and return a line, the same on every rank (collective).

    Raises SilentDataCorruption naming the ranks whose layer differed first.
    """
    first, second = (digests(train_state, batches, step) for _ in range(2))
    found = all_gather_object((socket.gethostname(), first_changed_layer(first, second)))
    differences = [(where, rank, host) for rank, (host, where) in enumerate(found) if where is not None]
    if not differences:
        return "computed twice more, all ranks have the same bits: look at the data and the learning rate"
    # the layers after it have wrong inputs
    earliest = min(where for where, _, _ in differences)
    named = {rank: f"rank {rank} on {host}" for where, rank, host in differences if where == earliest}
    micro_batch, layer = earliest
    error = SilentDataCorruption(
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
    found: list[Digest] = []
    train_state.finish_param_sync()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for chunk in train_state.model_chunks:
            for layer in chunk.transformer.layers:
                stack.enter_context(_recording(layer, found))
        count = batches.micro_batch_count(step)
        run_micro_batches(train_state, batches.step(step), count, training=False).read()
    return found


@contextlib.contextmanager
def _recording(layer: Any, found: list[Digest]) -> Iterator[None]:
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
    """Return the sum of all elements' bit patterns as integers, modulo 2**64."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))


# pp, tp, dp, cp rank
MeshCoord = tuple[int, int, int, int]
# the tied embedding on the first stage, and its copy on the last
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


class WeightHashMismatch(RuntimeError):
    """Ranks that must hold the same weights do not."""


class WeightHashCheck(Hook):
    """Compare the replicas every `resilience.check_replicas_every` steps."""

    def step(self, run: Run, info: StepResult) -> None:
        every = run.config.resilience.check_replicas_every
        if every is not None and info.step % every == 0:
            check_weight_hashes(run.train_state, info.step)


def check_weight_hashes(train_state: TrainState, step: int) -> None:
    """Compare the weights that several ranks hold (collective). Raises WeightHashMismatch naming the odd rank."""
    parallel, layout = train_state.config.parallel, train_state.layout
    if layout.topology.world == 1 or (parallel.engine == "deepspeed" and zero_stage(parallel) == 3):
        # ZeRO-3 holds each weight once
        return
    train_state.finish_param_sync()
    coord: MeshCoord = (layout.pp_rank, layout.tp_rank, layout.dp_rank, layout.cp_rank)
    ranks = all_gather_object((socket.gethostname(), coord, weight_bit_sums(train_state)))
    odd = first_differing_rank(ranks)
    if odd is not None:
        rank, other, name, count = odd
        usual = f"{count} others have, as" if count > 1 else "(of two, either may be wrong)"
        error = WeightHashMismatch(
            f"step {step}: rank {rank} on {ranks[rank][0]} holds other bits of {name} than {usual} rank {other} on"
            f" {ranks[other][0]}; suspect that hardware"
        )
        raise_on_all(error, {rank} if count > 1 else {rank, other}, layout.rank)


def weight_bit_sums(train_state: TrainState) -> dict[str, tuple[bool, int]]:
    """Return for each weight of this rank whether tensor parallelism shards it, and the sum of its bits."""
    found: dict[str, tuple[bool, int]] = {}
    for number, chunk in enumerate(train_state.model_chunks):
        for name, weight in chunk.named_parameters():
            sharded = bool(getattr(weight, "tensor_model_parallel", False))
            found[f"chunk {number} {name}" if number else name] = (sharded, sum_of_bits(raw_data(weight.data)))
    return found


def first_differing_rank(
    ranks: list[tuple[str, MeshCoord, dict[str, tuple[bool, int]]]],
) -> tuple[int, int, str, int] | None:
    """Find the first weight that differs between its replicas; None where all agree.

    Returns:
        The rank that differs from the majority, one rank of the majority, the weight's name, the majority's size.
    """
    groups: dict[tuple[Any, ...], dict[int, int]] = {}
    for rank, (_, (pp, tp, _, _), weights) in enumerate(ranks):
        for name, (sharded, total) in weights.items():
            tied = name.endswith(TIED)
            stage, known = (None, TIED[0]) if tied else (pp, name)
            groups.setdefault((stage, tp if sharded else None, known), {})[rank] = total
    for (*_, name), totals in groups.items():
        usual, count = Counter(totals.values()).most_common(1)[0]
        for rank, total in totals.items():
            if total != usual:
                other = next(r for r, value in totals.items() if value == usual)
                return rank, other, str(name), count
    return None
