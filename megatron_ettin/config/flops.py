"""Count the floating-point operations of training, and split layers over pipeline stages by their operations.

A multiply-add is two operations, and backward is twice forward. Attention counts (query, key) pairs inside the window
and inside a chunk. The head counts labelled positions only, because nothing else passes through it. Stages are split as
if every row were one chunk: a global layer of a long row does more than a local one, and the last stage has the head,
which for a small shape is more than all layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import OBJECTIVES, ROW_OBJECTIVES, HasShape, layer_parameter_count
from megatron_ettin.config.values import parse_points, share_at

if TYPE_CHECKING:
    import numpy as np

Lengths = TypeVar("Lengths", int, "np.ndarray")


def attended_pairs(lengths: Lengths, causal: bool, window: int | None) -> Lengths:
    """Return the number of (query, key) pairs of each chunk.

    Args:
        lengths: tokens of one chunk, or of many.
        causal: whether a query attends to keys up to itself only.
        window: keys to each side or, if causal, keys i-window+1..i of query i; None attends to the whole chunk.
    """
    # imported late, because it takes 0.1 s and shell completion does not need it
    import numpy as np

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
    """Return the number of layers that attend globally: with 3, layers 0, 3, 6, ..."""
    return (num_layers + global_every - 1) // global_every


def training_flops(
    shape: HasShape, vocab_size: int, tokens: float, labels: float, global_pairs: float, local_pairs: float
) -> float:
    """Return the operations of forward and backward of `tokens` tokens with `labels` predicted positions.

    Args:
        shape: shape of the model.
        vocab_size: rows of the output layer.
        tokens: number of tokens.
        labels: number of predicted positions.
        global_pairs: (query, key) pairs of one global layer, summed over the chunks.
        local_pairs: (query, key) pairs of one local layer, summed likewise.
    """
    hidden, layers = shape.hidden_size, shape.num_layers
    linear = 2 * layers * layer_parameter_count(shape) * tokens
    far = global_layers(layers, getattr(shape, "global_attention_every", 3))
    # q k^T and p v
    attention = 4 * hidden * (far * global_pairs + (layers - far) * local_pairs)
    head = 2 * (hidden * hidden + vocab_size * hidden) * labels
    return 3.0 * (linear + attention + head)


def flops_per_token(
    shape: HasShape, vocab_size: int, context_tokens: int, causal: bool, window: int, label_fraction: float
) -> float:
    """Return the training operations per token if every chunk has `context_tokens` tokens.

    `window` is that of `attended_pairs`; `label_fraction` is the share of tokens that are predicted.
    """
    n = context_tokens
    pairs = attended_pairs(n, causal, None), attended_pairs(n, causal, window)
    return training_flops(shape, vocab_size, n, n * label_fraction, *pairs) / n


def layer_operations(config: Config) -> list[float]:
    """Return the forward operations per token of each layer, in order; the head's are added to the last layer."""
    model, tokens = config.model, config.data.seq_len
    rows = [ROW_OBJECTIVES[name] for name in OBJECTIVES[config.run.objective].row_objectives]

    def attention(is_global: bool) -> float:
        pairs = [attended_pairs(tokens, row.causal, None if is_global else config.windows[row.causal]) for row in rows]
        return 4 * model.hidden_size * fmean(pairs) / tokens

    linear = 2.0 * layer_parameter_count(model)
    layers = [linear + attention(i % model.global_attention_every == 0) for i in range(model.num_layers)]
    labelled = fmean(config.data.mlm_probability if row.masks else 1.0 for row in rows)
    layers[-1] += 2 * labelled * model.hidden_size * (model.hidden_size + model.vocab_size)
    return layers


def split_evenly(costs: Sequence[float], stages: int) -> list[int]:
    """Split `costs` into `stages` contiguous parts, and return their lengths.

    No part is empty, and the most expensive one is as cheap as possible. Among equal splits, the one with the
    least sum of squares is returned.
    """
    return list(_split_evenly(tuple(costs), stages))


# a planner asks for the same stages of hundreds of layouts
@functools.lru_cache(maxsize=256)
def _split_evenly(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    ends = [0.0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    # best[n]: (most expensive part, sum of squares, lengths) of the first n layers in `stage` parts
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(1, stages + 1):
        stages_after = stages - stage
        longer = {}
        for n in range(stage, len(costs) - stages_after + 1):
            options = []
            for before, (highest, squares, lengths) in best.items():
                if before < n:
                    part = ends[n] - ends[before]
                    options.append((max(highest, part), squares + part * part, (*lengths, n - before)))
            longer[n] = min(options, key=lambda option: (_rounded(option[0]), _rounded(option[1]), option[2]))
        best = longer
    return best[len(costs)][2]


def _rounded(value: float) -> float:
    """Round to 9 significant digits, so that sums of the same numbers in another order are equal."""
    return round(value, 9 - math.ceil(math.log10(value))) if value > 0 else value


def mean_flops_per_token(config: Config) -> float:
    """Return the operations per token, averaged over the objective's row objectives by their shares.

    A hybrid run is counted with the shares at its end.
    """
    model, data, objective = config.model, config.data, OBJECTIVES[config.run.objective]
    shares = [1.0]
    if objective.is_hybrid:
        causal = share_at(parse_points(data.clm_fraction, "data.clm_fraction"), config.run.tokens)
        shares = [causal, 1 - causal]
    total = 0.0
    for name, share in zip(objective.row_objectives, shares, strict=True):
        rows = ROW_OBJECTIVES[name]
        labelled = data.mlm_probability if rows.masks else 1.0
        window = config.windows[rows.causal]
        total += share * flops_per_token(model, model.vocab_size, data.seq_len, rows.causal, window, labelled)
    return total
