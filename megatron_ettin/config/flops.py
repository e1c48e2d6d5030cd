"""Floating-point operations of training, counted exactly from what is computed: a multiply-add is two operations,
backward is twice forward. Attention counts (query, key) pairs inside the window and inside a chunk; the head counts
labelled positions only, because nothing else passes through it.

Which layers a pipeline stage holds: as equal work for each as whole layers allow.

Work is floating-point operations (flops.py) of rows that are one chunk: a global layer of a long row does more than a
local one, and the last stage has the head, which for a small shape is more than all layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import OBJECTIVES, ROW_OBJECTIVES, HasShape, layer_parameter_count

if TYPE_CHECKING:
    import numpy as np

Lengths = TypeVar("Lengths", int, "np.ndarray")


def attended_pairs(lengths: Lengths, causal: bool, window: int | None) -> Lengths:
    """(query, key) pairs of chunks of these lengths. `window`: keys to each side (bidirectional) or, causal,
    number of keys i-window+1..i; None attends to the whole chunk."""
    import numpy as np  # 0.1 s that completion does without

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


def layer_operations(config: Config) -> list[float]:
    """Operations a token of each layer's forward pass, in order; the head's are added to the last one's."""
    model, tokens = config.model, config.data.seq_len
    kinds = [ROW_OBJECTIVES[name] for name in OBJECTIVES[config.run.objective].kinds]

    def attention(is_global: bool) -> float:
        pairs = [
            attended_pairs(tokens, kind.causal, None if is_global else config.windows[kind.causal]) for kind in kinds
        ]
        return 4 * model.hidden_size * fmean(pairs) / tokens

    linear = 2.0 * layer_parameter_count(model)
    layers = [linear + attention(i % model.global_attention_every == 0) for i in range(model.num_layers)]
    labelled = fmean(config.data.mlm_probability if kind.masks else 1.0 for kind in kinds)
    layers[-1] += 2 * labelled * model.hidden_size * (model.hidden_size + model.vocab_size)
    return layers


def split_evenly(costs: Sequence[float], stages: int) -> list[int]:
    """Lengths of `stages` contiguous parts of `costs`, none empty, whose dearest part is as cheap as can be; of equal
    ones the split with the least sum of squares."""
    return list(_split_evenly(tuple(costs), stages))


@functools.lru_cache(maxsize=256)  # a planner asks for the same stages of hundreds of layouts
def _split_evenly(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    ends = [0.0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    # best[n]: (dearest part, sum of squares, lengths) of the first n layers in as many parts as stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(1, stages + 1):
        left = stages - stage
        found = {}
        for n in range(stage, len(costs) - left + 1):
            options = []
            for before, (dearest, squares, lengths) in best.items():
                if before < n:
                    part = ends[n] - ends[before]
                    options.append((max(dearest, part), squares + part * part, (*lengths, n - before)))
            found[n] = min(options, key=lambda option: (_rounded(option[0]), _rounded(option[1]), option[2]))
        best = found
    return best[len(costs)][2]


def _rounded(value: float) -> float:
    """Sums of the same numbers in another order are to tie."""
    return round(value, 9 - math.ceil(math.log10(value))) if value > 0 else value
