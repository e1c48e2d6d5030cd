"""The six published shapes, their exact parameter counts, and what a tensor-parallel degree must divide.

Source: the Ettin configurations (std/<size>/*.yaml, lines 24-27); the counts equal `transformers`' ModernBERT
classes at vocabulary 50,368 with a tied output (encoder and decoder have the same number)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

VOCABULARY = 50_368
HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """One published width and depth. Every head has 64 channels."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # inner width of the gated MLP: Wi has twice as many rows
    num_attention_heads: int


SIZES = {
    "17m": Shape(7, 256, 384, 4),
    "32m": Shape(10, 384, 576, 6),
    "68m": Shape(19, 512, 768, 8),
    "150m": Shape(22, 768, 1152, 12),
    "400m": Shape(28, 1024, 2624, 16),
    "1b": Shape(28, 1792, 3840, 28),
}


class HasShape(Protocol):
    """What the counts need to know: a `Shape` with a vocabulary, or the resolved `model` group."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...


def layer_parameter_count(shape: HasShape) -> int:
    """Weights of one layer's four matrices: Wqkv and Wo (4 H^2), Wi and mlp.Wo (3 H F)."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return 4 * hidden * hidden + 3 * hidden * ffn


def parameter_count(shape: HasShape, vocab_size: int = VOCABULARY) -> int:
    """Exact number of parameters: V H + L (4 H^2 + 3 H F) + norms (1 + (L-1) + L + 1) H + head (H^2 + H) + V."""
    hidden, layers = shape.hidden_size, shape.num_layers
    norms = (1 + (layers - 1) + layers + 1) * hidden
    head = hidden * hidden + hidden
    return vocab_size * hidden + layers * layer_parameter_count(shape) + norms + head + vocab_size


def tensor_parallel_degrees(shape: HasShape) -> list[int]:
    """The degrees that divide both the heads and the MLP's inner width (core pads the vocabulary itself)."""
    heads, ffn = shape.num_attention_heads, shape.ffn_hidden_size
    return [tp for tp in range(1, heads + 1) if heads % tp == 0 and ffn % tp == 0]
