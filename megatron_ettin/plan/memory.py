"""Estimate the bytes that training holds on one device, by part.

Weights, gradients and optimizer are exact arithmetic over the layout. Activations are counted operation by operation
from the tensors that each one saves for backward.

`fused` means that element-wise operations are compiled, as on GPUs, and that the attention kernel takes chunk
boundaries. Otherwise operations run one by one and attention is torch's scaled_dot_product_attention. `fused` follows
`runtime.compile` alone, so an uncompiled GPU run, or a compiled CPU run, is counted with the wrong attention.
tests/plan/test_memory.py compares the uncompiled count with real CPU ranks. The fused count is compared with nothing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from statistics import fmean

from megatron_ettin.config.layouts import micro_batches, stage_layers, with_split_rows, zero_stage
from megatron_ettin.config.operations import ParallelConfig
from megatron_ettin.config.schema import Config, PrecisionConfig
from megatron_ettin.config.tables import (
    BAND,
    CHUNK_LOGITS_BYTES,
    DENSE_ROW_TOKENS,
    DEVICE_CHUNK_ROWS,
    FEWEST_CHUNK_ROWS,
    OBJECTIVES,
    PRECISIONS,
    ROW_OBJECTIVES,
    layer_parameter_count,
)

# FP8 copies of each weight (1 byte each): row-wise for forward, column-wise for backward
FP8_COPIES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank. NCCL's buffers are not counted."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    """Peak bytes of the loss."""
    communication_bytes: int
    """Bytes of the all-gather buffers of tensor and context parallelism."""

    @property
    def total_bytes(self) -> int:
        """Return the sum of all parts."""
        return sum(asdict(self).values())


def estimate(config: Config, dp: int, on_gpu: bool = True) -> Memory:
    """Estimate the memory of the fullest pipeline rank.

    That is the first, which has most micro-batches in flight, or the last, which has the head.
    """
    ranks = {0, config.parallel.pp - 1}
    return max((rank_memory(config, dp, rank, on_gpu) for rank in ranks), key=lambda memory: memory.total_bytes)


def rank_memory(config: Config, dp: int, pp_rank: int, on_gpu: bool = True) -> Memory:
    """Estimate the memory of pipeline rank `pp_rank`."""
    config = with_split_rows(config, dp)
    model, parallel = config.model, config.parallel
    parameters, embedding = rank_parameters(config, pp_rank)
    is_fp32 = PRECISIONS[config.precision.name].compute == "fp32"
    shards = dp * parallel.cp if parallel.distributed_optimizer else 1
    stage, offloaded = zero_stage(parallel), parallel.zero_offload
    if stage:
        shards = dp * parallel.cp
    # bytes of fp32 moments per weight: muon has one moment (two of the embedding), the other optimizers have two
    moments = 4 if config.optim.name == "muon" else 8
    embedding_moments = (8 - moments) * embedding
    # fp32 masters of 16-bit weights; ZeRO has them of fp32 weights too, except in stage 3 without offload
    masters = 0 if is_fp32 and (not stage or (stage == 3 and offloaded == "none")) else 4
    state = (parameters * (moments + masters) + embedding_moments) // shards
    weights = parameters * (4 if is_fp32 else 2) // (shards if stage == 3 else 1)
    # with fp8_weights the FP8 copies replace the 16-bit weights
    if not config.precision.fp8_weights:
        weights += fp8_parameters(config, pp_rank) * FP8_COPIES
    saved, loss = micro_batch_bytes(config, dp, pp_rank, on_gpu)
    hidden = micro_batch_tokens(config) * model.hidden_size * element_bytes(config.precision)
    gathered = (hidden if parallel.sequence_parallel else 0) + (2 * hidden // parallel.tp if parallel.cp > 1 else 0)
    return Memory(
        weights_bytes=0 if offloaded == "all" else weights,
        gradients_bytes=parameters * (4 if config.precision.gradients == "fp32" else 2) // (shards if stage > 1 else 1),
        optimizer_bytes=0 if offloaded != "none" else state,
        activations_bytes=round(saved),
        logits_bytes=round(loss),
        communication_bytes=gathered,
    )


def rank_stages(config: Config, pp_rank: int) -> list[range]:
    """Return the layer indices, from 0, of each stage of a pipeline rank."""
    ends = list(itertools.accumulate(stage_layers(config)))
    return list(map(range, [0, *ends], ends))[pp_rank :: config.parallel.pp]


def rank_parameters(config: Config, pp_rank: int) -> tuple[int, int]:
    """Return how many parameters a rank of pipeline rank `pp_rank` holds, and how many of these the embedding has.

    The last stage's copy of the tied embedding counts too. Tensor parallelism does not shard norms and the head's
    dense layer.
    """
    model, parallel = config.model, config.parallel
    layers = sum(map(len, rank_stages(config, pp_rank)))
    first, last = pp_rank == 0, pp_rank == parallel.pp - 1
    # layer 0 has one norm
    norms = (2 * layers - (1 if first else 0)) * model.hidden_size
    sharded = layers * layer_parameter_count(model) // parallel.tp
    vocabulary = -(-model.vocab_size // parallel.tp)
    embedding = vocabulary * model.hidden_size if first or last else 0
    # the dense layer, its norm and the final norm, the vocabulary bias
    head = model.hidden_size**2 + 2 * model.hidden_size + vocabulary if last else 0
    return sharded + norms + embedding + (model.hidden_size if first else 0) + head, embedding


def fp8_parameters(config: Config, pp_rank: int) -> int:
    """Return how many of `rank_parameters` are in linears that multiply in FP8."""
    model, parallel, precision = config.model, config.parallel, config.precision
    if PRECISIONS[precision.name].fp8_recipe is None:
        return 0
    in_fp8 = range(precision.bf16_first_layers, model.num_layers - precision.bf16_last_layers)
    layers = sum(layer in in_fp8 for stage in rank_stages(config, pp_rank) for layer in stage)
    return layers * layer_parameter_count(model) // parallel.tp


def micro_batch_bytes(config: Config, dp: int, pp_rank: int, on_gpu: bool) -> tuple[float, float]:
    """Return the activation bytes of all micro-batches in flight on a pipeline rank, and the peak bytes of the loss."""
    parallel, fused = (
        config.parallel,
        config.runtime.compile == "always" or (on_gpu and config.runtime.compile == "auto"),
    )
    each = [layers_bytes(config, stage, fused) for stage in rank_stages(config, pp_rank)]
    recomputed = max(largest for _, largest in each)
    inputs = input_bytes(config, fused)
    saved = sum(kept for kept, _ in each) + inputs
    if pp_rank == 0:
        saved += embedding_bytes(config)
    # forward passes in flight before the first backward, in whole-model micro-batches
    ahead = parallel.pp - pp_rank - 1
    passes = ahead + 1 if parallel.vpp == 1 else (2 * ahead + (parallel.vpp - 1) * parallel.pp + 1) / parallel.vpp
    # the last micro-batch's inputs are held until the next comes
    saved = saved * min(passes, micro_batches(config, dp)) + inputs
    if pp_rank < parallel.pp - 1:
        return saved + recomputed, 0.0
    head, loss, left = head_bytes(config, fused)
    return saved + head, max(loss, left + recomputed)


def element_bytes(precision: PrecisionConfig) -> int:
    """Return the bytes of an element in the compute precision."""
    return 4 if PRECISIONS[precision.name].compute == "fp32" else 2


def micro_batch_tokens(config: Config) -> int:
    """Return the tokens of a micro-batch on one context-parallel rank."""
    return config.batch.micro_batch_rows * config.data.seq_len // config.parallel.cp


def sequence_parallel_degree(parallel: ParallelConfig) -> int:
    """Return the sequence-parallel degree: tp, or 1 without sequence parallelism."""
    return parallel.tp if parallel.sequence_parallel else 1


def layers_bytes(config: Config, layers: range, fused: bool) -> tuple[float, float]:
    """Return the bytes that layers save for backward, and those of the largest recomputed layer (0 if none is)."""
    by_layer = [layer_bytes(config, number, fused) for number in layers]
    recomputed = (config.parallel.recompute_layers or len(layers)) if config.parallel.recompute == "full" else 0
    recomputed = min(recomputed, len(layers))
    tokens = micro_batch_tokens(config) / sequence_parallel_degree(config.parallel)
    residual = config.model.hidden_size * element_bytes(config.precision) * tokens
    return recomputed * residual + sum(by_layer[recomputed:]), max(by_layer[:recomputed], default=0.0)


def layer_bytes(config: Config, number: int, fused: bool) -> float:
    """Return the bytes that layer `number`, counted from 0, saves for backward.

    These are two norms' inputs, statistics and outputs, the dropout's mask (or the tokens' keys), attention, and the
    MLP's inner products.
    """
    model, parallel, element = config.model, config.parallel, element_bytes(config.precision)
    norm = 2 * model.hidden_size * element + 2 * element
    outside = 2 * norm + (4 if fused else model.hidden_size)
    if number == 0:
        # layer 0 has no first norm: only its input is saved
        outside -= norm - model.hidden_size * element
    recomputed = parallel.recompute_modules if parallel.recompute == "selective" else []
    inner = 0 if "mlp" in recomputed else (3 if fused else 4) * model.ffn_hidden_size * element
    attention = 4 * model.hidden_size * element if "core_attn" in recomputed else attention_bytes(config, number, fused)
    split_outside = outside / sequence_parallel_degree(parallel)
    return micro_batch_tokens(config) * (split_outside + (inner + attention) / parallel.tp)


def attention_bytes(config: Config, number: int, fused: bool) -> float:
    """Return the bytes that attention saves per token, over all heads.

    These are rotated queries and keys, the buffer of q, k and v, the output, and the softmax's normalisers.
    """
    model, seq_len = config.model, config.data.seq_len
    element = element_bytes(config.precision)
    hidden, normalisers = model.hidden_size * element, 4 * model.num_attention_heads
    if fused:
        return 6 * hidden + normalisers

    def objective_bytes(causal: bool) -> float:
        window = None if number % model.global_attention_every == 0 else config.windows[causal]
        # q, k, v, out, and a dense [seq_len, seq_len] mask for each row
        if seq_len <= DENSE_ROW_TOKENS:
            return 6 * hidden + normalisers + element * seq_len
        # chunk by chunk, and the chunks' outputs concatenated
        if window is None or seq_len <= window:
            return 7 * hidden + normalisers
        keys = window_keys(config, causal)
        return (2 + 2 * keys // BAND) * hidden + normalisers + keys * element * config.parallel.tp

    return fmean(objective_bytes(ROW_OBJECTIVES[name].causal) for name in row_objectives(config))


def window_keys(config: Config, causal: bool) -> int:
    """Return how many keys a band of BAND queries of a local layer attends to, in whole bands."""
    window = config.windows[causal]
    before = math.ceil((window - 1 if causal else window) / BAND)
    return BAND * (before + 1 + (0 if causal else before))


def row_objectives(config: Config) -> tuple[str, ...]:
    """Return the names of the objectives that rows of the run may have."""
    return OBJECTIVES[config.run.objective].row_objectives


def input_bytes(config: Config, fused: bool) -> float:
    """Return the bytes of a micro-batch's inputs.

    These are ids, labels, positions, segments, tables of the rotation, and attention's masks.
    """
    model, element = config.model, element_bytes(config.precision)
    thetas = len({model.global_rope_theta, model.local_rope_theta})
    tables = 2 * thetas * (model.hidden_size // model.num_attention_heads) * element
    masks = 0 if fused else sum(window_keys(config, ROW_OBJECTIVES[name].causal) for name in row_objectives(config))
    return micro_batch_tokens(config) * (40 + tables + masks)


def embedding_bytes(config: Config) -> float:
    """Return the bytes saved by the embedding norm: its input and statistics."""
    tokens = micro_batch_tokens(config) / sequence_parallel_degree(config.parallel)
    return tokens * (config.model.hidden_size + 2) * element_bytes(config.precision)


def head_bytes(config: Config, fused: bool) -> tuple[float, float, float]:
    """Return bytes: saved by the final norm and the head, peak of the loss, left by the loss for backward.

    The saved bytes include the gathered hidden states. The peak is a chunk of logits, the gradient of the labelled
    hidden states, and the vocabulary's gradient in fp32, which is summed over chunks. Backward needs that gradient in
    the compute precision.
    """
    model, element, tokens = config.model, element_bytes(config.precision), micro_batch_tokens(config)
    share = fmean(config.data.mlm_probability if ROW_OBJECTIVES[name].masks else 1.0 for name in row_objectives(config))
    labelled = round(tokens * share)
    vocabulary = math.ceil(model.vocab_size / config.parallel.tp)
    norm = tokens * (model.hidden_size + 2) * element / sequence_parallel_degree(config.parallel)
    # of each label: position and id; inputs of dense, GELU and norm, the norm's output; loss and whether it is correct
    saved = norm + labelled * (16 + 4 * model.hidden_size * element + 4 + 1)
    gathered = tokens * model.hidden_size * element
    rows = max(FEWEST_CHUNK_ROWS, CHUNK_LOGITS_BYTES // (4 * vocabulary))
    chunk = min(rows, labelled) * vocabulary * (element + 4 + (4 if element < 4 else 0))
    # logits, their gradient, and the chunk's gradient of the vocabulary before it is added to the sum
    if fused:
        chunk = min(DEVICE_CHUNK_ROWS, labelled) * vocabulary * 2 * element
        chunk += vocabulary * model.hidden_size * element
    gradients = labelled * model.hidden_size * element + 4 * vocabulary * (model.hidden_size + 1)
    return saved + gathered, gradients + chunk, vocabulary * (model.hidden_size + 1) * element
