"""Do ranks that hold the same weights still hold the same bits? Nothing else would tell: a flipped bit in one replica
trains on, and which of them is saved is chance."""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import torch.distributed as dist

from megatron_ettin.config.zero import zero_stage
from megatron_ettin.faults.replay_check import sum_of_bits
from megatron_ettin.parallel.failure_report import raise_on_all
from megatron_ettin.platform.fp8_weights import raw
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.setup import Machine
from megatron_ettin.train.step import StepInfo

Place = tuple[int, int, int, int]  # pp, tp, dp, cp rank
# the tied embedding on the first stage, and its copy on the last
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


class ReplicasDiffer(RuntimeError):
    """Ranks that must hold the same weights do not."""


class Replicas(Hook):
    """Compares every `resilience.check_replicas_every` steps."""

    def step(self, run: Run, info: StepInfo) -> None:
        every = run.config.resilience.check_replicas_every
        if every is not None and info.step % every == 0:
            check_replicas(run.machine, info.step)


def check_replicas(machine: Machine, step: int) -> None:
    """Compare the weights that several ranks hold. Collective. Raises ReplicasDiffer, naming the odd rank."""
    parallel, layout = machine.config.parallel, machine.layout
    if layout.topology.world == 1 or (parallel.engine == "deepspeed" and zero_stage(parallel) == 3):
        return  # ZeRO-3 holds each weight once
    machine.settle()
    place: Place = (layout.pp_rank, layout.tp_rank, layout.dp_rank, layout.cp_rank)
    mine = (socket.gethostname(), place, sums(machine))
    ranks: list[Any] = [None] * layout.topology.world
    dist.all_gather_object(ranks, mine)
    odd = first_odd(ranks)
    if odd is not None:
        rank, other, name, count = odd
        told = f"{count} others have, as" if count > 1 else "(of two, either may be wrong)"
        error = ReplicasDiffer(
            f"step {step}: rank {rank} on {ranks[rank][0]} holds other bits of {name} than {told} rank {other} on"
            f" {ranks[other][0]}; suspect that hardware"
        )
        raise_on_all(error, {rank} if count > 1 else {rank, other}, layout.rank)


def sums(machine: Machine) -> dict[str, tuple[bool, int]]:
    """Of each weight of this rank: whether tensor parallelism cut it, and the sum of its bits."""
    found: dict[str, tuple[bool, int]] = {}
    for number, chunk in enumerate(machine.chunks):
        for name, weight in chunk.named_parameters():
            cut = bool(getattr(weight, "tensor_model_parallel", False))
            found[f"chunk {number} {name}" if number else name] = (cut, sum_of_bits(raw(weight.data)))
    return found


def first_odd(ranks: list[tuple[str, Place, dict[str, tuple[bool, int]]]]) -> tuple[int, int, str, int] | None:
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
