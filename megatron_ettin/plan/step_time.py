"""How long a step takes: arithmetic, memory traffic and communication of the busiest rank, by part.

A part's seconds are what it moves or computes over the rate of the part it runs on, times a constant. Four constants
are fitted to measured runs (calibration.py): operations at the peak, a cost a token and layer, traffic of element-wise
work, a cost a micro-batch. Communication is that of rings (each rank sends 2 (n-1)/n of what is all-reduced, (n-1)/n of
what is gathered or scattered) at the links' rates, and a latency for each rank passed; only what `parallel.overlap`
hides is taken as hidden. Sources: Megatron-LM (arXiv 2104.04473) for the pipeline's bubble, (2205.05198) for sequence
parallelism.

Bytes that a rank hands to collectives and transfers in a step, by axis: of what is gathered or scattered the whole,
as platform/comm_volume.py counts it on real ranks (tests/plan/test_volumes.py holds one against the other)."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, astuple, dataclass

from megatron_ettin.config.flops import layer_operations
from megatron_ettin.config.layouts import (
    full_batch_split,
    has_fixed_shapes,
    micro_batches,
    stage_layers,
    with_split_rows,
)
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import PRECISIONS, layer_parameter_count, parameter_count
from megatron_ettin.plan.dry_run import mean_flops_per_token
from megatron_ettin.plan.hardware import Gpu
from megatron_ettin.plan.memory import element_bytes, fp8_parameters, micro_batch_tokens, rank_parameters

# bytes that a weight's update moves: gradient and fp32 master, two moments, cleared gradient, 16-bit weight
UPDATE_BYTES = 50
# how much faster products are in FP8 than in bf16 at these widths; nanochat 1.17 over a whole step, Mosaic 1.10 to 1.35
FP8_SPEEDUP = {"fp8-delayed": 1.25, "fp8-current": 1.25, "fp8-blockwise": 1.15, "mxfp8": 1.25}
REFERENCE_BANDWIDTH = 3.35e12  # of the GPU that `token_layer_seconds` is of; others' scale by their memory's bandwidth
PUBLISHED_CHUNK_TOKENS = 615.4  # mean of the recipe's pretraining mixture
LINK_SHARE = 0.8  # of a link's rate that a ring reaches


@dataclass(frozen=True)
class Constants:
    """`operations`: seconds over seconds at the peak (2: half of the peak); `traffic`: the same of element-wise bytes;
    `token_layer_seconds`: of each token in each layer, whatever its width, on an H100; `micro_batch_seconds`: of each
    micro-batch, whatever its size, shared by pipeline stages as layers are; `step_seconds`: of each step."""

    operations: float
    token_layer_seconds: float
    traffic: float = 0.0
    step_seconds: float = 0.005
    micro_batch_seconds: float = 0.0

    def seconds(self, found: Features) -> float:
        """Of forward and backward."""
        return (
            self.operations * found.operations
            + self.traffic * found.traffic
            + self.token_layer_seconds * found.token_layers
            + self.micro_batch_seconds * found.micro_batches
        )


# fitted to the original's six published runs on four H100, `calibration.PUBLISHED_RUNS`, and within 3 % of each of them
PUBLISHED = Constants(operations=1.773, token_layer_seconds=26.58e-9, micro_batch_seconds=66.1e-3)


@dataclass(frozen=True)
class Features:
    """What the constants multiply: of the busiest rank, a step."""

    operations: float
    traffic: float
    token_layers: float
    micro_batches: float

    def plus(self, other: Features) -> Features:
        return Features(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part. `exposed_*`: communication that nothing hides."""

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
        return sum(asdict(self).values())


def usual_chunk_tokens(config: Config) -> float:
    """Of documents in rows where nobody says: the recipe's in pre-training, in later phases whole rows."""
    seq_len = float(config.data.seq_len)
    return min(PUBLISHED_CHUNK_TOKENS, seq_len) if config.run.phase == "pretrain" else seq_len


def computed_row_tokens(config: Config) -> float:
    """Return the tokens of a row that are computed: padding is not, where it can be left out."""
    if config.data.batching == "padded" and not has_fixed_shapes(config):
        return config.data.mean_tokens_per_row or float(config.data.seq_len)
    return float(config.data.seq_len)


def operations_per_token(config: Config, chunk_tokens: float) -> float:
    """Forward and backward, rows being chunks of that length."""
    return mean_flops_per_token(config.with_keys({"data.seq_len": max(1, round(chunk_tokens))}))


def stage_features(config: Config, gpu: Gpu, dp: int, chunk_tokens: float) -> list[Features]:
    """Of one rank's micro-batches, on each pipeline stage in model order."""
    model, parallel = config.model, config.parallel
    split = full_batch_split(config, dp)
    tokens = split.places / dp * computed_row_tokens(config) / parallel.cp
    operations = operations_per_token(config, chunk_tokens)
    linear = 6 * model.num_layers * layer_parameter_count(model)
    again = {"none": 1.0, "selective": 1.05, "full": 4 / 3}[parallel.recompute]
    speedup = FP8_SPEEDUP.get(config.precision.name, 1.0)
    a_token = (operations - linear + linear / speedup) * again / parallel.tp
    wide = 2 if PRECISIONS[config.precision.name].compute == "fp32" else 1  # half of the rate, twice the bytes
    slices = parallel.tp if parallel.sequence_parallel else 1
    moved = wide * (40 * model.hidden_size / slices + 20 * model.ffn_hidden_size / parallel.tp)
    costs, begin, found = layer_operations(config), 0, []
    for layers in stage_layers(config):
        share = sum(costs[begin : begin + layers]) / sum(costs)
        begin += layers
        found.append(
            Features(
                operations=a_token * share * tokens * wide / gpu.flops,
                traffic=layers * moved * tokens / gpu.bytes_per_second,
                token_layers=layers * tokens * REFERENCE_BANDWIDTH / gpu.bytes_per_second / parallel.tp,
                micro_batches=split.count * layers / model.num_layers,
            )
        )
    return found


def features(config: Config, gpu: Gpu, dp: int, chunk_tokens: float, constants: Constants = PUBLISHED) -> Features:
    """Of one rank's micro-batches, on the pipeline rank that `constants` make the busiest."""
    stages, pp = stage_features(config, gpu, dp, chunk_tokens), config.parallel.pp
    ranks = [functools.reduce(Features.plus, stages[rank::pp]) for rank in range(pp)]
    return max(ranks, key=constants.seconds)


def ring(gpu: Gpu, bytes_: float, ranks: int, apart: int, node: int, pieces: int = 1) -> float:
    """Seconds to gather or to scatter `bytes_` over a ring of every `apart`-th GPU, in so many pieces."""
    if ranks == 1:
        return 0.0
    rate = gpu.ring_rate(ranks, apart, node) * LINK_SHARE
    return bytes_ * (ranks - 1) / ranks / rate + pieces * gpu.ring_latency(ranks, apart, node)


def predict(config: Config, gpu: Gpu, dp: int, chunk_tokens: float, constants: Constants, node: int) -> StepTime:
    """Seconds of a step on `gpu`s in machines of `node`. Ranks of tp lie next to each other, then cp, dp, pp."""
    config = with_split_rows(config, dp)
    parallel, count = config.parallel, micro_batches(config, dp)
    compute = constants.seconds(features(config, gpu, dp, chunk_tokens, constants))
    bubble = compute * (parallel.pp - 1) / (parallel.vpp * count)
    tp, cp, pp = communication(config, gpu, dp, node)
    return StepTime(
        compute=compute,
        bubble=bubble,
        exposed_tp=tp,
        exposed_cp=cp,
        exposed_pp=pp,
        exposed_dp=data_parallel(config, gpu, dp, node, compute / count),
        optimizer=update_seconds(config, gpu, dp),
        other=constants.step_seconds,
    )


def communication(config: Config, gpu: Gpu, dp: int, node: int) -> tuple[float, float, float]:
    """Seconds a step of tensor, context and pipeline parallelism."""
    parallel, count = config.parallel, micro_batches(config, dp)
    hidden = hidden_bytes(config)
    passes = max(tensor_passes(config, rank) for rank in {0, parallel.pp - 1})
    each = 1 if parallel.sequence_parallel else 2  # an all-reduce goes around twice
    tp = count * passes * each * ring(gpu, hidden, parallel.tp, 1, node)
    layers = config.model.num_layers / parallel.pp
    # q, k, v and the output change hands, forward and backward
    cp = count * layers * 8 * ring(gpu, hidden / parallel.tp, parallel.cp, parallel.tp, node)
    pp = (count * (parallel.vpp - 1) + parallel.pp - 1) * 2 * hop_seconds(config, gpu, dp, node)
    if parallel.pp > 1:  # first and last stage sum their gradients of the vocabulary
        apart = parallel.tp * parallel.cp * dp
        pp += 2 * ring(gpu, tied_gradient_bytes(config), 2, apart, node)
    return tp, cp, pp


def hop_seconds(config: Config, gpu: Gpu, dp: int, node: int) -> float:
    """To send a micro-batch's activations, or their gradients, to the next pipeline stage."""
    parallel = config.parallel
    if parallel.pp == 1:
        return 0.0
    apart = parallel.tp * parallel.cp * dp
    rate = gpu.ring_rate(parallel.pp, apart, node) * LINK_SHARE
    return hop_bytes(config) / rate + gpu.ring_latency(2, apart, node)


def data_parallel(config: Config, gpu: Gpu, dp: int, node: int, micro_batch_seconds: float) -> float:
    """Seconds a step to reduce gradients and to gather weights, less what the passes beside them hide with
    `parallel.overlap`: all but the last bucket of gradients and the first of weights, if there is time."""
    parallel, model = config.parallel, config.model
    ranks = dp * parallel.cp
    weights = parameter_count(model, model.vocab_size) / (parallel.tp * parallel.pp)
    pieces = buckets(config, weights, dp)
    sharded = parallel.distributed_optimizer
    reduced_bytes, gathered_bytes = max(data_bytes(config, rank) for rank in {0, parallel.pp - 1})
    reduced = ring(gpu, reduced_bytes, ranks, parallel.tp, node, pieces)
    gathered = ring(gpu, gathered_bytes if sharded else reduced_bytes, ranks, parallel.tp, node, pieces)
    if not sharded and ranks > 1:  # one all-reduce, for which there are trees
        latency = gpu.ring_latency(ranks, parallel.tp, node), gpu.reduce_latency(ranks, parallel.tp, node)
        reduced, gathered = reduced - pieces * (latency[0] - latency[1]), gathered - pieces * latency[0]
    if not parallel.overlap:
        return reduced + gathered
    hideable = 1 - 1 / pieces
    # a model chunk's last backward passes, of a group of micro-batches, come while others' gradients are reduced
    passes = parallel.pp if parallel.vpp > 1 else 1
    seconds = 2 / 3 * micro_batch_seconds * passes
    if not sharded:
        return reduced + gathered - min(seconds, hideable * (reduced + gathered))
    hidden = min(seconds, hideable * reduced)
    if parallel.pp == 1:  # with stages weights are gathered at the step's end
        hidden += min(seconds / 2, hideable * gathered)
    return reduced + gathered - hidden


def buckets(config: Config, weights: float, dp: int) -> int:
    """In how many pieces core reduces the first stage's gradients: one without overlap; else of 40 million, or as many
    that each rank's share is a million, of the first model chunk, and one for each of the others."""
    if not config.parallel.overlap:
        return 1
    chunks = config.parallel.vpp
    return max(1, math.ceil(weights / chunks / max(40e6, 1e6 * dp))) + chunks - 1


def update_seconds(config: Config, gpu: Gpu, dp: int) -> float:
    parallel, model = config.parallel, config.model
    weights = parameter_count(model, model.vocab_size) / (parallel.tp * parallel.pp)
    shards = dp * parallel.cp if parallel.distributed_optimizer else 1
    return UPDATE_BYTES * weights / shards / gpu.bytes_per_second


def volumes(config: Config, dp: int, pp_rank: int) -> dict[str, float]:
    """Of a rank of that pipeline stage. Left out: sums over labels in the loss, gradients of norms, single numbers."""
    config = with_split_rows(config, dp)
    parallel, count = config.parallel, micro_batches(config, dp)
    hidden = hidden_bytes(config)
    found = dict.fromkeys(("tp", "cp", "pp", "dp"), 0.0)
    if parallel.tp > 1:
        found["tp"] = count * hidden * tensor_passes(config, pp_rank)
    if parallel.cp > 1:  # q, k, v and the output change hands, forward and backward
        found["cp"] = count * rank_layers(config, pp_rank) * 8 * hidden / parallel.tp
    if parallel.pp > 1:
        found["pp"] = transfers(config, pp_rank) * count * hop_bytes(config)
        if pp_rank in (0, parallel.pp - 1):
            found["pp"] += tied_gradient_bytes(config)
    if dp * parallel.cp > 1:
        found["dp"] = sum(data_bytes(config, pp_rank))
    return found


def rank_layers(config: Config, pp_rank: int) -> int:
    return sum(stage_layers(config)[pp_rank :: config.parallel.pp])


def hidden_bytes(config: Config) -> int:
    """Of a micro-batch's hidden states on one context rank."""
    return micro_batch_tokens(config) * config.model.hidden_size * element_bytes(config)


def hop_bytes(config: Config) -> float:
    """That a pipeline stage sends the next for a micro-batch."""
    return hidden_bytes(config) / (config.parallel.tp if config.parallel.sequence_parallel else 1)


def tensor_passes(config: Config, pp_rank: int) -> int:
    """How often hidden states are gathered, scattered or all-reduced for a micro-batch. With sequence parallelism a
    layer gathers twice and scatters twice each way, and gathers its two inputs once more for the weights' gradients;
    without, it all-reduces twice each way."""
    pp, layers = config.parallel.pp, rank_layers(config, pp_rank)
    if not config.parallel.sequence_parallel:
        return 4 * layers + (pp_rank == 0)
    return 10 * layers + 2 * (pp_rank == 0) + (pp_rank == pp - 1)


def transfers(config: Config, pp_rank: int) -> int:
    """Hidden states and gradients that a rank sends for a micro-batch, those between its own model chunks included."""
    pp, vpp = config.parallel.pp, config.parallel.vpp
    forward, backward = vpp - (pp_rank == pp - 1), vpp - (pp_rank == 0)
    return forward + backward


def tied_gradient_bytes(config: Config) -> int:
    """Of the vocabulary's weights, whose gradients first and last stage sum."""
    rows = -(-config.model.vocab_size // config.parallel.tp)
    return rows * config.model.hidden_size * gradient_bytes(config)


def gradient_bytes(config: Config) -> int:
    return 4 if config.precision.gradients == "fp32" or PRECISIONS[config.precision.name].compute == "fp32" else 2


def data_bytes(config: Config, pp_rank: int) -> tuple[int, int]:
    """(gradients that are reduced, weights that are gathered); without the distributed optimizer nothing is."""
    parameters, _ = rank_parameters(config, pp_rank)
    gathered = parameters * element_bytes(config) if config.parallel.distributed_optimizer else 0
    if config.precision.fp8_weights:
        gathered -= fp8_parameters(config, pp_rank)
    return parameters * gradient_bytes(config), gathered
