"""Check that ranks agree on code, configuration, data and weights, and that a step gives the same bits again.

A node with an older checkout, another dataset under the same path or a clock that is off would train on silently, and
the run would be lost. So would a flipped bit in the weights of one data-parallel replica: which replica is saved is
chance. Each check names the rank that differs and its host.

A step whose figures are anomalous can be replayed, to tell silent data corruption from a bad batch: the same inputs and
weights give the same bits on a device that is sound.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import megatron_ettin
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.versions import clock_warnings, code_hash, first_difference, library_versions
from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.layouts import zero_stage
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import Config
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.parallel.collectives import all_gather_object, barrier, world_size
from megatron_ettin.parallel.failure_report import raise_on_all
from megatron_ettin.platform.fp8 import raw_data
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import StepResult
from megatron_ettin.train.setup import TrainState
from megatron_ettin.train.step import run_micro_batches

# pp, tp, dp, cp rank
MeshCoord = tuple[int, int, int, int]
# micro-batch, layer (from 0, of the whole model), sum of the bits of its output
Digest = tuple[int, int, int]
# micro-batch, layer
Difference = tuple[int, int]
# the tied embedding on the first stage, and its copy on the last
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


def comparable_facts(config: Config, corpus: BlendedDataset) -> dict[str, str]:
    """Return the values that must be equal on all ranks, by the name that an error message gives them."""
    return {
        "code of megatron_ettin": f"{megatron_ettin.__version__} ({code_hash()})",
        "libraries": library_versions(),
        "configuration (sha256)": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "data order": corpus.fingerprint[:12],
        "tokenizer": corpus.tokenizer_fingerprint[:12],
    }


def check_ranks_consistent(config: Config, corpus: BlendedDataset) -> None:
    """Check that all ranks have the same code, libraries, configuration, data order and tokenizer (collective).

    Rank 0 warns if the hosts' clocks differ.

    Raises:
        UserError: on every rank, naming the ranks that differ from the majority.
    """
    if world_size() == 1:
        return
    own: dict[str, Any] = {"host": socket.gethostname(), "facts": comparable_facts(config, corpus)}
    ranks = all_gather_object(own)
    disagreement = first_difference([rank["host"] for rank in ranks], [rank["facts"] for rank in ranks])
    if disagreement is not None:
        raise UserError(disagreement)
    barrier()
    now = all_gather_object(time.time())
    if dist.get_rank() == 0:
        for line in clock_warnings([rank["host"] for rank in ranks], now):
            log_warning(line)


class WeightHashMismatchError(RuntimeError):
    """Ranks that must hold the same weights do not."""


class WeightHashCheck(Hook):
    """Compares the weights that several ranks hold, every `resilience.check_replicas_every` steps."""

    def step(self, run: Run, info: StepResult) -> None:
        """Compare the weights if the step is a multiple of `resilience.check_replicas_every` (collective)."""
        every = run.config.resilience.check_replicas_every
        if every is not None and info.step % every == 0:
            check_weight_hashes(run.train_state, info.step)


def check_weight_hashes(train_state: TrainState, step: int) -> None:
    """Compare the weights that several ranks hold, after `step` steps (collective).

    Raises WeightHashMismatchError on the rank that differs (if only two ranks hold a weight, on both) and
    PeerFailureError on the others.
    """
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
        error = WeightHashMismatchError(
            f"step {step}: rank {rank} on {ranks[rank][0]} holds other bits of {name} than {usual} rank {other} on"
            f" {ranks[other][0]}; suspect that hardware"
        )
        raise_on_all(error, {rank} if count > 1 else {rank, other}, layout.rank)


def weight_bit_sums(train_state: TrainState) -> dict[str, tuple[bool, int]]:
    """Return, by weight name of this rank, (whether tensor parallelism shards the weight, `sum_of_bits` of it)."""
    sums: dict[str, tuple[bool, int]] = {}
    for number, chunk in enumerate(train_state.model_chunks):
        for name, weight in chunk.named_parameters():
            sharded = bool(getattr(weight, "tensor_model_parallel", False))
            sums[f"chunk {number} {name}" if number else name] = (sharded, sum_of_bits(raw_data(weight.data)))
    return sums


def first_differing_rank(
    ranks: list[tuple[str, MeshCoord, dict[str, tuple[bool, int]]]],
) -> tuple[int, int, str, int] | None:
    """Find the first weight that differs between its replicas.

    Args:
        ranks: host, coordinate and `weight_bit_sums` of each rank.

    Returns:
        The rank that differs from the majority, one rank of the majority, the weight's name, the majority's size; None
        if all replicas agree.
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


def sum_of_bits(tensor: torch.Tensor) -> int:
    """Return the sum of all elements' bit patterns as integers, modulo 2**64."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))


class SilentDataCorruptionError(RuntimeError):
    """A rank computed other bits from the same inputs."""


def replay_check(train_state: TrainState, batches: Batches, step: int) -> str:
    """Run the forward pass of `step` (from 0) twice, and return a log line if the bits are equal (collective).

    If they differ, raises SilentDataCorruptionError on the ranks whose layer differed first, and PeerFailureError on
    the others.
    """
    first, second = (digests(train_state, batches, step) for _ in range(2))
    ranks = all_gather_object((socket.gethostname(), first_changed_layer(first, second)))
    differences = [(where, rank, host) for rank, (host, where) in enumerate(ranks) if where is not None]
    if not differences:
        return "computed twice more, all ranks have the same bits: look at the data and the learning rate"
    # layers after the first difference have wrong inputs, so they show nothing about their own rank
    earliest = min(where for where, _, _ in differences)
    named = {rank: f"rank {rank} on {host}" for where, rank, host in differences if where == earliest}
    micro_batch, layer = earliest
    error = SilentDataCorruptionError(
        f"step {step + 1}, computed twice more: the output of layer {layer} for micro-batch {micro_batch} has other"
        f" bits the second time on {', '.join(named.values())}; suspect that hardware"
    )
    raise_on_all(error, named, train_state.layout.rank)


def first_changed_layer(first: list[Digest], second: list[Digest]) -> Difference | None:
    """Return the first micro-batch and layer whose output differs between two passes; None if all agree."""
    pairs = zip(first, second, strict=True)
    return min(((a[0], a[1]) for a, b in pairs if a != b), default=None)


def digests(train_state: TrainState, batches: Batches, step: int) -> list[Digest]:
    """Return the digests of this rank's layers in one forward pass of `step` (from 0), in order (collective)."""
    layers: list[Digest] = []
    train_state.finish_param_sync()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for chunk in train_state.model_chunks:
            for layer in chunk.transformer.layers:
                stack.enter_context(layer.register_forward_hook(_recorder(layers)))
        count = batches.host.count(step)
        run_micro_batches(train_state, batches.step(step), count, training=False).read()
    return layers


def _recorder(digests: list[Digest]) -> Callable[[Any, Any, Any], None]:
    """Return a forward hook for one layer, which adds the digest of each of its outputs."""
    micro_batches = itertools.count()

    def record(layer: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        digests.append((next(micro_batches), layer.layer_number - 1, sum_of_bits(hidden)))

    return record
