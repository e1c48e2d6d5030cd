"""Is it the data or the machine? The forward pass of a bad step run twice, the outputs of every layer compared bit by
bit: the same inputs and weights give the same bits on a device that is sound.

Do ranks that hold the same weights still hold the same bits? Nothing else would tell: a flipped bit in one replica
trains on, and which of them is saved is chance."""

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

Digest = tuple[int, int, int]  # micro-batch, layer (from 0, of the whole model), sum of the bits of its output
Difference = tuple[int, int]  # micro-batch, layer


class SilentDataCorruption(RuntimeError):
    """A rank computes other bits from the same ones."""


def replay_check(train_state: TrainState, batches: Batches, step: int) -> str:
    """What two more forward passes of `step` (from 0) say. Collective; the same on every rank. Raises SilentCorruption
    naming the rank whose layer came out differently first."""
    first, second = (digests(train_state, batches, step) for _ in range(2))
    found = all_gather_object((socket.gethostname(), first_difference(first, second)))
    differences = [(where, rank, host) for rank, (host, where) in enumerate(found) if where is not None]
    if not differences:
        return "computed twice more, all ranks have the same bits: look at the data and the learning rate"
    earliest = min(where for where, _, _ in differences)  # what comes after it has wrong inputs
    named = {rank: f"rank {rank} on {host}" for where, rank, host in differences if where == earliest}
    micro_batch, layer = earliest
    error = SilentDataCorruption(
        f"step {step + 1}, computed twice more: the output of layer {layer} for micro-batch {micro_batch} has other"
        f" bits the second time on {', '.join(named.values())}; suspect that hardware"
    )
    raise_on_all(error, named, train_state.layout.rank)


def first_difference(first: list[Digest], second: list[Digest]) -> Difference | None:
    """Where two passes part."""
    pairs = zip(first, second, strict=True)
    return min(((a[0], a[1]) for a, b in pairs if a != b), default=None)


def digests(train_state: TrainState, batches: Batches, step: int) -> list[Digest]:
    """Of this rank's layers in one forward pass of a step, in the order in which they were computed. Collective."""
    found: list[Digest] = []
    train_state.finish_param_sync()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for chunk in train_state.model_chunks:
            for layer in chunk.transformer.layers:
                stack.enter_context(_noting(layer, found))
        count = batches.micro_batch_count(step)
        run_micro_batches(train_state, batches.step(step), count, training=False).read()
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


Place = tuple[int, int, int, int]  # pp, tp, dp, cp rank
# the tied embedding on the first stage, and its copy on the last
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


class WeightHashMismatch(RuntimeError):
    """Ranks that must hold the same weights do not."""


class WeightHashCheck(Hook):
    """Compares every `resilience.check_replicas_every` steps."""

    def step(self, run: Run, info: StepResult) -> None:
        every = run.config.resilience.check_replicas_every
        if every is not None and info.step % every == 0:
            check_weight_hashes(run.train_state, info.step)


def check_weight_hashes(train_state: TrainState, step: int) -> None:
    """Compare the weights that several ranks hold. Collective. Raises ReplicasDiffer, naming the odd rank."""
    parallel, layout = train_state.config.parallel, train_state.layout
    if layout.topology.world == 1 or (parallel.engine == "deepspeed" and zero_stage(parallel) == 3):
        return  # ZeRO-3 holds each weight once
    train_state.finish_param_sync()
    place: Place = (layout.pp_rank, layout.tp_rank, layout.dp_rank, layout.cp_rank)
    ranks = all_gather_object((socket.gethostname(), place, sums(train_state)))
    odd = first_differing_rank(ranks)
    if odd is not None:
        rank, other, name, count = odd
        told = f"{count} others have, as" if count > 1 else "(of two, either may be wrong)"
        error = WeightHashMismatch(
            f"step {step}: rank {rank} on {ranks[rank][0]} holds other bits of {name} than {told} rank {other} on"
            f" {ranks[other][0]}; suspect that hardware"
        )
        raise_on_all(error, {rank} if count > 1 else {rank, other}, layout.rank)


def sums(train_state: TrainState) -> dict[str, tuple[bool, int]]:
    """Of each weight of this rank: whether tensor parallelism cut it, and the sum of its bits."""
    found: dict[str, tuple[bool, int]] = {}
    for number, chunk in enumerate(train_state.model_chunks):
        for name, weight in chunk.named_parameters():
            cut = bool(getattr(weight, "tensor_model_parallel", False))
            found[f"chunk {number} {name}" if number else name] = (cut, sum_of_bits(raw_data(weight.data)))
    return found


def first_differing_rank(
    ranks: list[tuple[str, Place, dict[str, tuple[bool, int]]]],
) -> tuple[int, int, str, int] | None:
    """(rank that differs from the most, one of the most, the weight's name, how many they are); None: all agree."""
    groups: dict[tuple[Any, ...], dict[int, int]] = {}
    for rank, (_, (pp, tp, _, _), weights) in enumerate(ranks):
        for name, (cut, total) in weights.items():
            tied = name.endswith(TIED)
            stage, known = (None, TIED[0]) if tied else (pp, name)
            groups.setdefault((stage, tp if cut else None, known), {})[rank] = total
    for (*_, name), totals in groups.items():
        usual, count = Counter(totals.values()).most_common(1)[0]
        for rank, total in totals.items():
            if total != usual:
                other = next(r for r, value in totals.items() if value == usual)
                return rank, other, str(name), count
    return None
