"""Predict a step's seconds by part: arithmetic, memory traffic and communication of the busiest rank.

A part's seconds are its operations or bytes, divided by the rate of the device or link, times a constant. Four
constants are fitted to measured runs (calibration.py): operations at the peak, a cost per token and layer, traffic of
element-wise work, a cost per micro-batch. Communication goes over rings at the links' rates, with a latency for each
rank passed; each rank sends 2 (n-1)/n of the bytes of an all-reduce, (n-1)/n of those of a gather or scatter. Only
communication that `parallel.overlap` hides counts as hidden. Sources: Megatron-LM (arXiv 2104.04473) for the
pipeline's bubble, (2205.05198) for sequence parallelism.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megatron_ettin.config.flops import layer_operations, mean_flops_per_token
from megatron_ettin.config.layouts import (
    full_batch_split,
    has_fixed_shapes,
    micro_batches,
    stage_layers,
    with_split_rows,
)
from megatron_ettin.config.schema import Config, PrecisionConfig
from megatron_ettin.config.tables import PRECISIONS, layer_parameter_count, parameter_count
from megatron_ettin.plan.hardware import GpuSpec
from megatron_ettin.plan.memory import (
    element_bytes,
    fp8_parameters,
    micro_batch_tokens,
    rank_parameters,
    rank_stages,
    sequence_parallel_degree,
)

# bytes that a weight's update moves: gradient and fp32 master, two moments, cleared gradient, 16-bit weight
UPDATE_BYTES = 50
# speed of FP8 matrix products over bf16 ones at these widths; nanochat: 1.17 over a whole step, Mosaic: 1.10 to 1.35
FP8_SPEEDUP = {"fp8-delayed": 1.25, "fp8-current": 1.25, "fp8-blockwise": 1.15, "mxfp8": 1.25}
# memory bandwidth of an H100, which `token_layer_seconds` refers to; other GPUs are scaled by theirs
REFERENCE_BANDWIDTH = 3.35e12
# mean tokens of a chunk in the recipe's pre-training mixture
PUBLISHED_CHUNK_TOKENS = 615.4
# share of a link's rate that a ring reaches
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Constants:
    """Constants of the step model."""

    operations: float
    """Seconds of arithmetic over those at the GPU's peak (2: half of the peak)."""
    token_layer_seconds: float
    """Seconds of each token in each layer, whatever its width, on an H100."""
    traffic: float = 0.0
    """Seconds of element-wise memory traffic over those at the memory's peak rate."""
    step_seconds: float = 0.005
    """Fixed seconds of each step."""
    micro_batch_seconds: float = 0.0
    """Fixed seconds of each micro-batch over the whole model; a pipeline stage takes the share of its layers."""

    def seconds(self, work: StepWork) -> float:
        """Return the seconds of forward and backward passes."""
        return (
            self.operations * work.operations
            + self.traffic * work.traffic
            + self.token_layer_seconds * work.token_layers
            + self.micro_batch_seconds * work.micro_batches
        )


# fitted to the original's six published runs on four H100, `calibration.PUBLISHED_RUNS`, and within 3 % of each
PUBLISHED = Constants(operations=1.773, token_layer_seconds=26.58e-9, micro_batch_seconds=66.1e-3)


class StepWork(NamedTuple):
    """Amounts of one step's work on one rank, which the constants multiply."""

    operations: float
    """Seconds of the arithmetic at the GPU's bf16 peak; FP8 products count as shorter."""
    traffic: float
    """Seconds of the element-wise traffic at the memory's peak rate."""
    token_layers: float
    """Tokens x layers, scaled to the memory bandwidth of an H100."""
    micro_batches: float
    """Micro-batches x the share of the layers that the rank holds."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part. `exposed_*` is communication that nothing hides."""

    compute: float
    bubble: float
    exposed_tp: float
    exposed_cp: float
    exposed_pp: float
    exposed_dp: float
    optimizer: float
    other: float

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return float(sum(asdict(self).values()))


def usual_chunk_tokens(config: Config) -> float:
    """Return the default mean tokens of a chunk: the recipe's in pre-training, whole rows in later phases."""
    seq_len = float(config.data.seq_len)
    return min(PUBLISHED_CHUNK_TOKENS, seq_len) if config.run.phase == "pretrain" else seq_len


def computed_row_tokens(config: Config) -> float:
    """Return the mean tokens of a row that are computed; padding is left out unless shapes are fixed."""
    if config.data.batching == "padded" and not has_fixed_shapes(config):
        return config.data.mean_tokens_per_row or float(config.data.seq_len)
    return float(config.data.seq_len)


def operations_per_token(config: Config, chunk_tokens: float) -> float:
    """Return the operations of forward and backward per token, for chunks of `chunk_tokens` tokens."""
    return mean_flops_per_token(config.with_keys({"data.seq_len": max(1, round(chunk_tokens))}))


@dataclass(frozen=True)
class StepModel:
    """Model of a step's seconds on hosts of GPUs. Ranks are ordered by tp (adjacent), then cp, dp and pp."""

    gpu: GpuSpec
    node: int
    """GPUs per host."""
    chunk_tokens: float
    """Mean tokens of a chunk."""
    constants: Constants = PUBLISHED

    def predict(self, config: Config, dp: int) -> StepTime:
        """Predict the seconds of a step at data-parallel degree `dp`."""
        config = with_split_rows(config, dp)
        parallel, count = config.parallel, micro_batches(config, dp)
        compute = self.constants.seconds(self.busiest_rank_work(config, dp))
        tp, cp, pp = self.communication(config, dp)
        return StepTime(
            compute=compute,
            bubble=compute * (parallel.pp - 1) / (parallel.vpp * count),
            exposed_tp=tp,
            exposed_cp=cp,
            exposed_pp=pp,
            exposed_dp=self.data_parallel(config, dp, compute / count),
            optimizer=self.update_seconds(config, dp),
            other=self.constants.step_seconds,
        )

    def stage_work(self, config: Config, dp: int) -> list[StepWork]:
        """Return the work of a data-parallel rank's micro-batches on each pipeline stage, in model order."""
        model, parallel = config.model, config.parallel
        split = full_batch_split(config, dp)
        tokens = split.capacity / dp * computed_row_tokens(config) / parallel.cp
        operations = operations_per_token(config, self.chunk_tokens)
        linear = 6 * model.num_layers * layer_parameter_count(model)
        recomputed = {"none": 1.0, "selective": 1.05, "full": 4 / 3}[parallel.recompute]
        speedup = FP8_SPEEDUP.get(config.precision.name, 1.0)
        per_token = (operations - linear + linear / speedup) * recomputed / parallel.tp
        # fp32 runs at half of the rate and moves twice the bytes
        wide = 2 if PRECISIONS[config.precision.name].compute == "fp32" else 1
        shards = sequence_parallel_degree(parallel)
        moved = wide * (40 * model.hidden_size / shards + 20 * model.ffn_hidden_size / parallel.tp)
        costs, begin, works = layer_operations(config), 0, []
        for layers in stage_layers(config):
            share = sum(costs[begin : begin + layers]) / sum(costs)
            begin += layers
            works.append(
                StepWork(
                    operations=per_token * share * tokens * wide / self.gpu.flops,
                    traffic=layers * moved * tokens / self.gpu.bytes_per_second,
                    token_layers=layers * tokens * REFERENCE_BANDWIDTH / self.gpu.bytes_per_second / parallel.tp,
                    micro_batches=split.count * layers / model.num_layers,
                )
            )
        return works

    def busiest_rank_work(self, config: Config, dp: int) -> StepWork:
        """Return the work of a data-parallel rank's micro-batches on the pipeline rank that needs most seconds."""
        stages, pp = self.stage_work(config, dp), config.parallel.pp
        ranks = [StepWork(*map(sum, zip(*stages[rank::pp]))) for rank in range(pp)]
        return max(ranks, key=self.constants.seconds)

    def communication(self, config: Config, dp: int) -> tuple[float, float, float]:
        """Return the communication seconds per step of tensor, context and pipeline parallelism."""
        parallel, count = config.parallel, micro_batches(config, dp)
        hidden = hidden_bytes(config)
        passes = max(tensor_passes(config, rank) for rank in {0, parallel.pp - 1})
        # an all-reduce goes around the ring twice
        each = 1 if parallel.sequence_parallel else 2
        tp = count * passes * each * self.ring(hidden, parallel.tp, 1)
        layers = config.model.num_layers / parallel.pp
        # q, k, v and the output are exchanged, forward and backward
        cp = count * layers * 8 * self.ring(hidden / parallel.tp, parallel.cp, parallel.tp)
        pp = (count * (parallel.vpp - 1) + parallel.pp - 1) * 2 * self.hop_seconds(config, dp)
        if parallel.pp > 1:
            # first and last stage sum their gradients of the vocabulary
            stride = parallel.tp * parallel.cp * dp
            pp += 2 * self.ring(tied_gradient_bytes(config), 2, stride)
        return tp, cp, pp

    def hop_seconds(self, config: Config, dp: int) -> float:
        """Return the seconds to send a micro-batch's activations, or their gradients, to the next pipeline stage."""
        parallel = config.parallel
        if parallel.pp == 1:
            return 0.0
        stride = parallel.tp * parallel.cp * dp
        rate = self.gpu.ring_rate(parallel.pp, stride, self.node) * LINK_SHARE
        return hop_bytes(config) / rate + self.gpu.ring_latency(2, stride, self.node)

    def data_parallel(self, config: Config, dp: int, micro_batch_seconds: float) -> float:
        """Return the seconds per step of reducing gradients and gathering weights that no computation hides.

        With `parallel.overlap`, concurrent passes hide all but the last bucket of gradients and the first of weights,
        if they take long enough. `micro_batch_seconds`: forward and backward of one micro-batch.
        """
        parallel, ranks = config.parallel, dp * config.parallel.cp
        pieces = buckets(config, dp)
        sharded = parallel.distributed_optimizer
        reduced_bytes, gathered_bytes = max(data_bytes(config, rank) for rank in {0, parallel.pp - 1})
        reduced = self.ring(reduced_bytes, ranks, parallel.tp, pieces)
        gathered = self.ring(gathered_bytes if sharded else reduced_bytes, ranks, parallel.tp, pieces)
        if not sharded and ranks > 1:
            # the two are one all-reduce, whose latency can be that of a tree
            ring = self.gpu.ring_latency(ranks, parallel.tp, self.node)
            tree = self.gpu.reduce_latency(ranks, parallel.tp, self.node)
            reduced, gathered = reduced - pieces * (ring - tree), gathered - pieces * ring
        if not parallel.overlap:
            return reduced + gathered
        hideable = 1 - 1 / pieces
        # with several model chunks, the backward passes of a group of micro-batches run while gradients are reduced
        passes = parallel.pp if parallel.vpp > 1 else 1
        seconds = 2 / 3 * micro_batch_seconds * passes
        if not sharded:
            return reduced + gathered - min(seconds, hideable * (reduced + gathered))
        hidden = min(seconds, hideable * reduced)
        if parallel.pp == 1:
            # with pipeline stages, weights are gathered at the end of the step
            hidden += min(seconds / 2, hideable * gathered)
        return reduced + gathered - hidden

    def ring(self, bytes_: float, ranks: int, stride: int, pieces: int = 1) -> float:
        """Return the seconds to gather or scatter `bytes_`, in pieces, over `ranks` GPUs that are `stride` apart."""
        if ranks == 1:
            return 0.0
        rate = self.gpu.ring_rate(ranks, stride, self.node) * LINK_SHARE
        return bytes_ * (ranks - 1) / ranks / rate + pieces * self.gpu.ring_latency(ranks, stride, self.node)

    def update_seconds(self, config: Config, dp: int) -> float:
        """Return the seconds of the optimizer's update."""
        shards = dp * config.parallel.cp if config.parallel.distributed_optimizer else 1
        return UPDATE_BYTES * mean_rank_weights(config) / shards / self.gpu.bytes_per_second


def buckets(config: Config, dp: int) -> int:
    """Return the number of buckets in which core reduces a rank's gradients.

    Without overlap there is one. Otherwise the first model chunk has buckets of 40 million weights, or of a million
    per data-parallel rank if that is more, and each other chunk has one bucket.
    """
    if not config.parallel.overlap:
        return 1
    chunks = config.parallel.vpp
    return max(1, math.ceil(mean_rank_weights(config) / chunks / max(40e6, 1e6 * dp))) + chunks - 1


def mean_rank_weights(config: Config) -> float:
    """Return the number of weights of a rank, averaged over the pipeline ranks."""
    return parameter_count(config.model, config.model.vocab_size) / (config.parallel.tp * config.parallel.pp)


def hidden_bytes(config: Config) -> int:
    """Return the bytes of a micro-batch's hidden states on one context-parallel rank."""
    return micro_batch_tokens(config) * config.model.hidden_size * element_bytes(config.precision)


def hop_bytes(config: Config) -> float:
    """Return the bytes that a pipeline stage sends the next for a micro-batch."""
    return hidden_bytes(config) / sequence_parallel_degree(config.parallel)


def tensor_passes(config: Config, pp_rank: int) -> int:
    """Return how often tensor parallelism gathers, scatters or all-reduces hidden states for a micro-batch.

    With sequence parallelism a layer gathers twice and scatters twice each way, and gathers its two inputs once more
    for the weights' gradients. Without, it all-reduces twice each way.
    """
    pp, layers = config.parallel.pp, sum(map(len, rank_stages(config, pp_rank)))
    if not config.parallel.sequence_parallel:
        return 4 * layers + (pp_rank == 0)
    return 10 * layers + 2 * (pp_rank == 0) + (pp_rank == pp - 1)


def tied_gradient_bytes(config: Config) -> int:
    """Return the bytes of the gradients of the vocabulary's weights, which first and last stage sum."""
    rows = -(-config.model.vocab_size // config.parallel.tp)
    return rows * config.model.hidden_size * gradient_bytes(config.precision)


def gradient_bytes(precision: PrecisionConfig) -> int:
    """Return the bytes of an element of a gradient."""
    return 4 if precision.gradients == "fp32" or PRECISIONS[precision.name].compute == "fp32" else 2


def data_bytes(config: Config, pp_rank: int) -> tuple[int, int]:
    """Return the bytes of gradients that a pipeline rank reduces, and of weights that it gathers.

    Without the distributed optimizer nothing is gathered.
    """
    parameters, _ = rank_parameters(config, pp_rank)
    gathered = parameters * element_bytes(config.precision) if config.parallel.distributed_optimizer else 0
    if config.precision.fp8_weights:
        gathered -= fp8_parameters(config, pp_rank)
    return parameters * gradient_bytes(config.precision), gathered
