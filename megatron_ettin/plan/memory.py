"""Bytes that training holds on one device, by part. Weights, gradients and optimizer are exact arithmetic over the
layout; what micro-batches hold is counted operation by operation (activations.py).

Bytes that one micro-batch holds on a pipeline rank, counted from the tensors that each operation saves for backward.

`fused`: element-wise work compiled, as on GPUs, and attention by a kernel that takes boundaries; else the operations
one by one and attention as model/attention.py does it. tests/plan/test_memory.py holds both against real runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean

from megatron_ettin.config.layouts import micro_batches, stage_layers, with_split_rows, zero_stage
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import OBJECTIVES, PRECISIONS, ROW_OBJECTIVES, layer_parameter_count

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
    hidden = micro_batch_tokens(config) * model.hidden_size * element_bytes(config)
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
        layers_bytes(config, begins[number], stages[number], fused)
        for number in range(pp_rank, len(stages), parallel.pp)
    ]
    again = max(one for _, one in each)
    inputs = input_bytes(config, fused)
    saved = sum(kept for kept, _ in each) + inputs
    if pp_rank == 0:
        saved += embedding_bytes(config)
    # passes forward before the first backward, in micro-batches of the rank's whole model
    ahead = parallel.pp - pp_rank - 1
    passes = ahead + 1 if parallel.vpp == 1 else (2 * ahead + (parallel.vpp - 1) * parallel.pp + 1) / parallel.vpp
    saved = saved * min(passes, count) + inputs  # the last one's are held until the next comes
    if pp_rank < parallel.pp - 1:
        return saved + again, 0.0
    head, loss, left = head_bytes(config, fused)
    return saved + head, max(loss, left + again)


# of model/loss.py and model/attention.py, which a plan does not import: they need torch and core
CHUNK_LOGITS_BYTES, FEWEST_ROWS, DEVICE_CHUNK_ROWS = 64 * 2**20, 64, 4096
BAND, DENSE_ROW_TOKENS = 64, 192


def element_bytes(config: Config) -> int:
    return 4 if PRECISIONS[config.precision.name].compute == "fp32" else 2


def micro_batch_tokens(config: Config) -> int:
    """On one context-parallel rank."""
    return config.batch.micro_batch_rows * config.data.seq_len // config.parallel.cp


def slices(config: Config) -> int:
    """Tensor-parallel ranks that share the tokens outside of matrix products."""
    return config.parallel.tp if config.parallel.sequence_parallel else 1


def layers_bytes(config: Config, first: int, layers: int, fused: bool) -> tuple[float, float]:
    """(saved by layers `first`, `first` + 1, ...; what backward makes again of them, one at a time)."""
    whole = [layer_bytes(config, number, fused) for number in range(first, first + layers)]
    again = (config.parallel.recompute_layers or layers) if config.parallel.recompute == "full" else 0
    again = min(again, layers)
    residual = config.model.hidden_size * element_bytes(config) / slices(config) * micro_batch_tokens(config)
    return again * residual + sum(whole[again:]), max(whole[:again], default=0.0)


def layer_bytes(config: Config, number: int, fused: bool) -> float:
    """Saved by layer `number`, counted from 0: two norms' inputs, statistics and outputs, the dropout's mask (or the
    tokens' keys), attention, the MLP's inner products."""
    model, parallel, element = config.model, config.parallel, element_bytes(config)
    norm = 2 * model.hidden_size * element + 2 * element
    outside = 2 * norm + (4 if fused else model.hidden_size)
    if number == 0:
        outside -= norm - model.hidden_size * element  # it has no first norm, but an input of its own
    recomputed = parallel.recompute_modules if parallel.recompute == "selective" else []
    inner = 0 if "mlp" in recomputed else (3 if fused else 4) * model.ffn_hidden_size * element
    attention = 4 * model.hidden_size * element if "core_attn" in recomputed else attention_bytes(config, number, fused)
    return micro_batch_tokens(config) * (outside / slices(config) + (inner + attention) / parallel.tp)


def attention_bytes(config: Config, number: int, fused: bool) -> float:
    """A token's, over all heads: rotated queries and keys, the buffer of q, k and v, what comes out, the softmax's
    normalisers."""
    model, seq_len = config.model, config.data.seq_len
    hidden, normalisers = model.hidden_size * element_bytes(config), 4 * model.num_attention_heads
    if fused:
        return 6 * hidden + normalisers

    def kind_bytes(causal: bool) -> float:
        window = None if number % model.global_attention_every == 0 else config.windows[causal]
        if seq_len <= DENSE_ROW_TOKENS:  # q, k, v, out under a mask of whole rows
            return 6 * hidden + normalisers + element_bytes(config) * seq_len
        if window is None or seq_len <= window:  # chunk by chunk, and the pieces put together
            return 7 * hidden + normalisers
        reach = reach_tokens(config, causal)
        return (2 + 2 * reach // BAND) * hidden + normalisers + reach * element_bytes(config) * config.parallel.tp

    return fmean(kind_bytes(ROW_OBJECTIVES[name].causal) for name in kinds(config))


def reach_tokens(config: Config, causal: bool) -> int:
    """Keys, in whole bands, that a local layer's band of queries is held against."""
    window = config.windows[causal]
    before = math.ceil((window - 1 if causal else window) / BAND)
    return BAND * (before + 1 + (0 if causal else before))


def kinds(config: Config) -> tuple[str, ...]:
    return OBJECTIVES[config.run.objective].kinds


def input_bytes(config: Config, fused: bool) -> float:
    """Of a micro-batch itself: ids, labels, positions, segments, tables of the rotation and attention's masks."""
    model, element = config.model, element_bytes(config)
    thetas = len({model.global_rope_theta, model.local_rope_theta})
    tables = 2 * thetas * (model.hidden_size // model.num_attention_heads) * element
    masks = 0 if fused else sum(reach_tokens(config, ROW_OBJECTIVES[name].causal) for name in kinds(config))
    return micro_batch_tokens(config) * (40 + tables + masks)


def embedding_bytes(config: Config) -> float:
    """Saved by the embedding norm: its input and statistics."""
    return micro_batch_tokens(config) * (config.model.hidden_size + 2) * element_bytes(config) / slices(config)


def head_bytes(config: Config, fused: bool) -> tuple[float, float, float]:
    """(saved by the final norm and the head; what the loss holds at its fullest: a chunk of logits, and the gradient
    of the vocabulary in fp32, which is summed over chunks; what it leaves for backward)."""
    model, element, tokens = config.model, element_bytes(config), micro_batch_tokens(config)
    share = fmean(config.data.mlm_probability if ROW_OBJECTIVES[kind].masks else 1.0 for kind in kinds(config))
    labelled = round(tokens * share)
    vocabulary = math.ceil(model.vocab_size / config.parallel.tp)
    norm = tokens * (model.hidden_size + 2) * element / slices(config)
    # positions, labels; inputs of dense, GELU and norm, the norm's output; losses
    saved = norm + labelled * (16 + 4 * model.hidden_size * element + 4 + 1)
    gathered = tokens * model.hidden_size * element
    rows = max(FEWEST_ROWS, CHUNK_LOGITS_BYTES // (4 * vocabulary))
    chunk = min(rows, labelled) * vocabulary * (element + 4 + (4 if element < 4 else 0))
    if fused:  # logits and their gradient, and a product that is added to the sum
        chunk = min(DEVICE_CHUNK_ROWS, labelled) * vocabulary * 2 * element
        chunk += vocabulary * model.hidden_size * element
    gradients = labelled * model.hidden_size * element + 4 * vocabulary * (model.hidden_size + 1)
    return saved + gathered, gradients + chunk, vocabulary * (model.hidden_size + 1) * element
