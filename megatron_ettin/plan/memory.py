"""Bytes that training holds on one device, by part. Weights, gradients and optimizer are exact arithmetic over the
layout; what micro-batches hold is counted operation by operation (activations.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_ettin.config.layouts import micro_batches, stage_layers, with_split_rows
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config
from megatron_ettin.config.sizes import layer_parameter_count
from megatron_ettin.config.zero import zero_stage
from megatron_ettin.plan import activations

FP8_COPIES = 2  # of a byte: Hopper reads rows in the forward pass and columns in the backward pass


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank. `logits_bytes`: of the loss at its fullest; `communication_bytes`: what tensor and
    context parallelism gather into. NCCL's own buffers are in none of them."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    communication_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(asdict(self).values())


def estimate(config: Config, dp: int, on_gpu: bool = True) -> Memory:
    """Memory of the fullest pipeline rank: the first, which has most micro-batches in flight, or the last, which has
    the head."""
    ranks = {0, config.parallel.pp - 1}
    return max((of_rank(config, dp, rank, on_gpu) for rank in ranks), key=lambda found: found.total_bytes)


def of_rank(config: Config, dp: int, pp_rank: int, on_gpu: bool = True) -> Memory:
    """Memory of pipeline rank `pp_rank`."""
    config = with_split_rows(config, dp)
    model, parallel = config.model, config.parallel
    parameters, embedding = rank_parameters(config, pp_rank)
    wide = PRECISIONS[config.precision.name].compute == "fp32"
    shards = dp * parallel.cp if parallel.distributed_optimizer else 1
    stage, offloaded = zero_stage(parallel), parallel.zero_offload
    if stage:  # ZeRO has fp32 masters of fp32 weights below stage 3
        shards = dp * parallel.cp
    moments = 4 if config.optim.name == "muon" else 8  # one moment of muon's (all but the embedding), two of the others
    embedding_moments = (8 - moments) * embedding
    masters = 0 if wide and (not stage or (stage == 3 and offloaded == "none")) else 4  # fp32, beside the weights
    state = (parameters * (moments + masters) + embedding_moments) // shards
    weights = parameters * (4 if wide else 2) // (shards if stage == 3 else 1)
    if not config.precision.fp8_weights:  # else in place of those of 16 bits
        weights += fp8_parameters(config, pp_rank) * FP8_COPIES
    saved, loss = micro_batch_bytes(config, dp, pp_rank, on_gpu)
    hidden = activations.micro_batch_tokens(config) * model.hidden_size * activations.element_bytes(config)
    gathered = (hidden if parallel.sequence_parallel else 0) + (2 * hidden // parallel.tp if parallel.cp > 1 else 0)
    return Memory(
        weights_bytes=0 if offloaded == "all" else weights,
        gradients_bytes=parameters * (4 if config.precision.gradients == "fp32" else 2) // (shards if stage > 1 else 1),
        optimizer_bytes=0 if offloaded != "none" else state,
        activations_bytes=round(saved),
        logits_bytes=round(loss),
        communication_bytes=gathered,
    )


def rank_parameters(config: Config, pp_rank: int) -> tuple[int, int]:
    """(parameters, those of the embedding among them) that one rank of that pipeline stage and its vocabulary's copy
    holds; norms and the head's dense layer are not cut by tensor parallelism."""
    model, parallel = config.model, config.parallel
    layers = sum(stage_layers(config)[pp_rank :: parallel.pp])
    first, last = pp_rank == 0, pp_rank == parallel.pp - 1
    norms = (2 * layers - (1 if first else 0)) * model.hidden_size  # layer 0 has one
    cut = layers * layer_parameter_count(model) // parallel.tp
    vocabulary = -(-model.vocab_size // parallel.tp)
    embedding = vocabulary * model.hidden_size if first or last else 0
    head = model.hidden_size**2 + 2 * model.hidden_size + vocabulary if last else 0  # the final norm with it
    return cut + norms + embedding + (model.hidden_size if first else 0) + head, embedding


def fp8_parameters(config: Config, pp_rank: int) -> int:
    """Of `rank_parameters` those in linears that multiply in FP8."""
    model, parallel, precision = config.model, config.parallel, config.precision
    if PRECISIONS[precision.name].fp8_recipe is None:
        return 0
    stages = stage_layers(config)
    begins = [sum(stages[:number]) for number in range(len(stages))]
    first, end = precision.bf16_first_layers, model.num_layers - precision.bf16_last_layers
    layers = sum(
        first <= layer < end
        for number in range(pp_rank, len(stages), parallel.pp)
        for layer in range(begins[number], begins[number] + stages[number])
    )
    return layers * layer_parameter_count(model) // parallel.tp


def micro_batch_bytes(config: Config, dp: int, pp_rank: int, on_gpu: bool) -> tuple[float, float]:
    """(activations of all micro-batches in flight, the loss) of a pipeline rank."""
    parallel, fused = config.parallel, config.run.fuse == "always" or (on_gpu and config.run.fuse == "auto")
    stages, count = stage_layers(config), micro_batches(config, dp)
    begins = [sum(stages[:number]) for number in range(len(stages))]
    each = [
        activations.layers_bytes(config, begins[number], stages[number], fused)
        for number in range(pp_rank, len(stages), parallel.pp)
    ]
    again = max(one for _, one in each)
    inputs = activations.input_bytes(config, fused)
    saved = sum(kept for kept, _ in each) + inputs
    if pp_rank == 0:
        saved += activations.embedding_bytes(config)
    # passes forward before the first backward, in micro-batches of the rank's whole model
    ahead = parallel.pp - pp_rank - 1
    passes = ahead + 1 if parallel.vp == 1 else (2 * ahead + (parallel.vp - 1) * parallel.pp + 1) / parallel.vp
    saved = saved * min(passes, count) + inputs  # the last one's are held until the next comes
    if pp_rank < parallel.pp - 1:
        return saved + again, 0.0
    head, loss, left = activations.head_bytes(config, fused)
    return saved + head, max(loss, left + again)
