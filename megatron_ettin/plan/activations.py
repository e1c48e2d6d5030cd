"""Bytes that one micro-batch holds on a pipeline rank, counted from the tensors that each operation saves for backward.

`fused`: element-wise work compiled, as on GPUs, and attention by a kernel that takes boundaries; else the operations
one by one and attention as model/attention.py does it. tests/plan/test_memory.py holds both against real runs."""

from __future__ import annotations

import math
from statistics import fmean

from megatron_ettin.config.layouts import recomputed_modules
from megatron_ettin.config.objectives import KINDS, OBJECTIVES
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config

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
    recomputed = recomputed_modules(parallel) if parallel.recompute == "selective" else []
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

    return fmean(kind_bytes(KINDS[name].causal) for name in kinds(config))


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
    masks = 0 if fused else sum(reach_tokens(config, KINDS[name].causal) for name in kinds(config))
    return micro_batch_tokens(config) * (40 + tables + masks)


def embedding_bytes(config: Config) -> float:
    """Saved by the embedding norm: its input and statistics."""
    return micro_batch_tokens(config) * (config.model.hidden_size + 2) * element_bytes(config) / slices(config)


def head_bytes(config: Config, fused: bool) -> tuple[float, float, float]:
    """(saved by the final norm and the head; what the loss holds at its fullest: a chunk of logits, and the gradient
    of the vocabulary in fp32, which is summed over chunks; what it leaves for backward)."""
    model, element, tokens = config.model, element_bytes(config), micro_batch_tokens(config)
    share = fmean(config.data.mlm_probability if KINDS[kind].masks else 1.0 for kind in kinds(config))
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
