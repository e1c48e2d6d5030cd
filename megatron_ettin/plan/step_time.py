"""How long a step takes: arithmetic, memory traffic and communication of the busiest rank, by part.

A part's seconds are what it moves or computes over the rate of the part it runs on, times a constant. Three constants
are fitted to measured runs (calibration.py): operations at the peak, a cost a token and layer, traffic of element-wise
work. Communication is that of rings (each rank sends 2 (n-1)/n of what is all-reduced, (n-1)/n of what is gathered or
scattered) at the links' rates; only what `parallel.overlap` hides is taken as hidden. Sources: Megatron-LM (arXiv
2104.04473) for the pipeline's bubble, (2205.05198) for sequence parallelism's traffic."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass

from megatron_ettin.config.balance import layer_operations
from megatron_ettin.config.layouts import micro_batches, stage_layers
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config
from megatron_ettin.config.sizes import layer_parameter_count, parameter_count
from megatron_ettin.plan.dry_run import mean_flops_per_token
from megatron_ettin.plan.hardware import Gpu

# bytes that a weight's update moves: gradient and fp32 master, two moments, cleared gradient, 16-bit weight
UPDATE_BYTES = 50
# how much faster products are in FP8 than in bf16 at these widths; nanochat 1.17 over a whole step, Mosaic 1.10 to 1.35
FP8_SPEEDUP = {"fp8-delayed": 1.25, "fp8-current": 1.25, "fp8-blockwise": 1.15, "mxfp8": 1.25}
REFERENCE_BANDWIDTH = 3.35e12  # of the GPU that `token_layer_seconds` is of; others' scale by their memory's bandwidth
LINK_SHARE = 0.8  # of a link's rate that a ring reaches


@dataclass(frozen=True)
class Constants:
    """`operations`: seconds over seconds at the peak (2: half of the peak); `traffic`: the same of element-wise bytes;
    `token_layer_seconds`: of each token in each layer, whatever its width, on an H100; `step_seconds`: of each step."""

    operations: float
    token_layer_seconds: float
    traffic: float = 0.0
    step_seconds: float = 0.005


# fitted to the original's published 150m and 400m on four H100 (296k and 146k tokens/s each); its 68m and 1b are then
# predicted within 2 % and 8 %: tests/plan/test_plan.py
PUBLISHED = Constants(operations=2.02, token_layer_seconds=79.8e-9)


@dataclass(frozen=True)
class Features:
    """What the constants multiply, in seconds: of the busiest rank, a step."""

    operations: float
    traffic: float
    token_layers: float


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


def operations_per_token(config: Config, chunk_tokens: float) -> float:
    """Forward and backward, rows being chunks of that length."""
    data = dataclasses.replace(config.data, seq_len=max(1, round(chunk_tokens)))
    return mean_flops_per_token(dataclasses.replace(config, data=data))


def features(config: Config, gpu: Gpu, dp: int, chunk_tokens: float) -> Features:
    """Of one rank's micro-batches, on the busiest pipeline stage."""
    model, parallel, count = config.model, config.parallel, micro_batches(config, dp)
    tokens = count * config.batch.micro_batch_rows * config.data.seq_len / parallel.cp
    operations = operations_per_token(config, chunk_tokens)
    linear = 6 * model.num_layers * layer_parameter_count(model)
    again = {"none": 1.0, "selective": 1.05, "full": 4 / 3}[parallel.recompute]
    speedup = FP8_SPEEDUP.get(config.precision.name, 1.0)
    a_token = (operations - linear + linear / speedup) * again / parallel.tp
    wide = 2 if PRECISIONS[config.precision.name].compute == "fp32" else 1  # half of the rate, twice the bytes
    share, layers = busiest_stage(config)
    slices = parallel.tp if parallel.sequence_parallel else 1
    moved = wide * layers * (40 * model.hidden_size / slices + 20 * model.ffn_hidden_size / parallel.tp)
    return Features(
        operations=a_token * share * tokens * wide / gpu.flops,
        traffic=moved * tokens / gpu.bytes_per_second,
        token_layers=layers * tokens * REFERENCE_BANDWIDTH / gpu.bytes_per_second / max(1, parallel.tp),
    )


def busiest_stage(config: Config) -> tuple[float, float]:
    """(share of the model's operations, layers) of the pipeline stage that has most."""
    parallel, costs = config.parallel, layer_operations(config)
    found, begin = [[0.0, 0.0] for _ in range(parallel.pp)], 0
    for number, length in enumerate(stage_layers(config)):
        found[number % parallel.pp][0] += sum(costs[begin : begin + length])
        found[number % parallel.pp][1] += length
        begin += length
    share, layers = max(found)
    return share / sum(costs), layers


def ring(bytes_: float, ranks: int, rate: float) -> float:
    """Seconds to gather or to scatter `bytes_` over a ring; an all-reduce is both."""
    return bytes_ * (ranks - 1) / ranks / (rate * LINK_SHARE) if ranks > 1 else 0.0


def predict(config: Config, gpu: Gpu, dp: int, chunk_tokens: float, constants: Constants, node: int) -> StepTime:
    """Seconds of a step on `gpu`s in machines of `node`. Ranks of tp lie next to each other, then cp, dp, pp."""
    parallel, count = config.parallel, micro_batches(config, dp)
    found = features(config, gpu, dp, chunk_tokens)
    compute = (
        constants.operations * found.operations
        + constants.traffic * found.traffic
        + constants.token_layer_seconds * found.token_layers
    )
    bubble = compute * (parallel.pp - 1) / (parallel.vp * count)
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
    model, parallel, count = config.model, config.parallel, micro_batches(config, dp)
    element = 4 if PRECISIONS[config.precision.name].compute == "fp32" else 2
    hidden = config.batch.micro_batch_rows * config.data.seq_len / parallel.cp * model.hidden_size * element
    layers = model.num_layers / parallel.pp
    # forward and backward each gather and scatter twice a layer (all-reduces without sequence parallelism are the same)
    tp = count * layers * 8 * ring(hidden, parallel.tp, gpu.ring_rate(parallel.tp, 1, node))
    # q, k, v and the output change hands, forward and backward
    exchange = hidden / parallel.tp
    cp = count * layers * 8 * ring(exchange, parallel.cp, gpu.ring_rate(parallel.cp, parallel.tp, node))
    slices = parallel.tp if parallel.sequence_parallel else 1
    rate = gpu.ring_rate(parallel.pp, parallel.tp * parallel.cp * dp, node)
    hop = 2 * hidden / slices / (rate * LINK_SHARE)
    pp = (count * (parallel.vp - 1) + parallel.pp - 1) * hop if parallel.pp > 1 else 0.0
    return tp, cp, pp


def data_parallel(config: Config, gpu: Gpu, dp: int, node: int, micro_batch_seconds: float) -> float:
    """Seconds a step to reduce gradients and to gather weights, less what the last backward and the first forward pass
    hide with `parallel.overlap`."""
    parallel, model = config.parallel, config.model
    ranks = dp * parallel.cp
    weights = parameter_count(model, model.vocab_size) / (parallel.tp * parallel.pp)
    rate = gpu.ring_rate(ranks, parallel.tp, node)
    gradient = 2 if config.precision.gradients == "bf16" else 4
    weight = 4 if PRECISIONS[config.precision.name].compute == "fp32" else 2
    reduced = ring(weights * gradient, ranks, rate)
    gathered = ring(weights * (weight if parallel.distributed_optimizer else gradient), ranks, rate)
    if not parallel.overlap:
        return reduced + gathered
    gathers = gathered if parallel.pp > 1 else max(0.0, gathered - micro_batch_seconds / 3)
    return max(0.0, reduced - micro_batch_seconds * 2 / 3) + gathers


def update_seconds(config: Config, gpu: Gpu, dp: int) -> float:
    parallel, model = config.parallel, config.model
    weights = parameter_count(model, model.vocab_size) / (parallel.tp * parallel.pp)
    shards = dp * parallel.cp if parallel.distributed_optimizer else 1
    return UPDATE_BYTES * weights / shards / gpu.bytes_per_second
