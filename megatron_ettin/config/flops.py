"""Floating-point operations of training, counted exactly from what is computed: a multiply-add is two operations,
backward is twice forward. Attention counts (query, key) pairs inside the window and inside a chunk; the head counts
labelled positions only, because nothing else passes through it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from megatron_ettin.config.sizes import HasShape, layer_parameter_count

Lengths = TypeVar("Lengths", int, np.ndarray)


def attended_pairs(lengths: Lengths, causal: bool, window: int | None) -> Lengths:
    """(query, key) pairs of chunks of these lengths. `window`: keys to each side (bidirectional) or, causal,
    number of keys i-window+1..i; None attends to the whole chunk."""
    n = np.asarray(lengths, dtype=np.int64)
    whole = n * (n + 1) // 2 if causal else n * n
    if window is None:
        pairs = whole
    elif causal:
        pairs = np.where(n <= window, whole, n * window - window * (window - 1) // 2)
    else:
        pairs = np.where(n <= window + 1, whole, n * (2 * window + 1) - window * (window + 1))
    return pairs if isinstance(lengths, np.ndarray) else int(pairs)


def global_layers(num_layers: int, global_every: int = 3) -> int:
    """Layers 0, 3, 6, ... attend globally."""
    return (num_layers + global_every - 1) // global_every


def training_flops(
    shape: HasShape, vocab_size: int, tokens: float, labels: float, global_pairs: float, local_pairs: float
) -> float:
    """Operations of forward and backward of `tokens` tokens with `labels` predicted positions; pairs are those of
    one global and of one local layer, summed over the chunks."""
    hidden, layers = shape.hidden_size, shape.num_layers
    linear = 2 * layers * layer_parameter_count(shape) * tokens
    far = global_layers(layers, getattr(shape, "global_attention_every", 3))
    attention = 4 * hidden * (far * global_pairs + (layers - far) * local_pairs)  # q k^T and p v
    head = 2 * (hidden * hidden + vocab_size * hidden) * labels
    return 3.0 * (linear + attention + head)


def flops_per_token(
    shape: HasShape, vocab_size: int, context_tokens: int, causal: bool, window: int, label_fraction: float
) -> float:
    """Training operations a token when every chunk has `context_tokens` tokens."""
    n = context_tokens
    pairs = attended_pairs(n, causal, None), attended_pairs(n, causal, window)
    return training_flops(shape, vocab_size, n, n * label_fraction, *pairs) / n
