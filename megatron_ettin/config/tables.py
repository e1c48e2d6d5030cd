"""The six published shapes, their exact parameter counts, and what a tensor-parallel degree must divide.

Source: the Ettin configurations (std/<size>/*.yaml, lines 24-27); the counts equal `transformers`' ModernBERT
classes at vocabulary 50,368 with a tied output (encoder and decoder have the same number).

The objectives. Encoder and decoder differ in these rows and in nothing else.

A row of the batch is read in one of three ways (`ROW_OBJECTIVES`); an objective names which of them its rows may have.
`mntp` is masked next-token prediction (the hidden state before a masked token predicts it), which the original trainer
used to train decoders on as encoders; the `hybrid` ones mix causal and masked rows in one model, as GPT-BERT does
(arXiv 2410.24159).

Precisions by name: the type of weights and activations, and the FP8 recipe where there is one.

FP8 and MXFP8 run in Transformer Engine's linears only; `multiple` is what hidden/tp and ffn/tp must be divisible by.

Name models: by the published size if the shape is exactly that one, else by the number of parameters.

`run.size` names the recipe that a run began with; its keys may have given the model any other shape since."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ettin.base.text import format_count

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


IGNORE = -100  # the label of a position that predicts nothing


@dataclass(frozen=True)
class RowObjective:
    """How a row is read: whether attention is causal, whether tokens are masked, whether position i predicts i + 1."""

    causal: bool
    masks: bool
    shifts: bool


ROW_OBJECTIVES = {
    "mlm": RowObjective(causal=False, masks=True, shifts=False),
    "clm": RowObjective(causal=True, masks=False, shifts=True),
    "mntp": RowObjective(causal=False, masks=True, shifts=True),
}


@dataclass(frozen=True)
class Objective:
    """`kinds`: of its rows; where there are two, the first is the causal one and `data.clm_fraction` its share.
    `exports`: the objectives of the models that its weights are exported as, the first unless told otherwise."""

    kinds: tuple[str, ...]
    exports: tuple[str, ...]

    @property
    def needs_mask_token(self) -> bool:
        return any(ROW_OBJECTIVES[kind].masks for kind in self.kinds)

    @property
    def masked_kind(self) -> str | None:
        """How its rows with masked tokens are read; None where it has none."""
        return next((kind for kind in self.kinds if ROW_OBJECTIVES[kind].masks), None)

    @property
    def is_hybrid(self) -> bool:
        return len(self.kinds) > 1

    @property
    def causal(self) -> bool:
        """Whether all rows are."""
        return all(ROW_OBJECTIVES[kind].causal for kind in self.kinds)


OBJECTIVES = {
    "mlm": Objective(("mlm",), ("mlm",)),
    "clm": Objective(("clm",), ("clm",)),
    "mntp": Objective(("mntp",), ("mlm",)),
    "hybrid": Objective(("clm", "mlm"), ("mlm", "clm")),
    "hybrid_mntp": Objective(("clm", "mntp"), ("mlm", "clm")),
}
EXPORTED = ("mlm", "clm")  # what a checkpoint can be exported as: an encoder or a decoder of transformers


@dataclass(frozen=True)
class Precision:
    """One row of the table. `fp8_recipe` is the name core's TransformerConfig takes, or None."""

    compute: str  # "fp32" or "bf16": type of weights and activations outside FP8 linears
    fp8_recipe: str | None = None
    multiple: int = 1


PRECISIONS = {
    "fp32": Precision("fp32"),
    "bf16": Precision("bf16"),
    "fp8-delayed": Precision("bf16", "delayed", 16),
    "fp8-current": Precision("bf16", "tensorwise", 16),
    "fp8-blockwise": Precision("bf16", "blockwise", 128),
    "mxfp8": Precision("bf16", "mxfp8", 32),
}


def short_name(size: object, model: object) -> str:
    """Return `17m` for a model of that published shape and vocabulary, else its parameter count, such as `176K`.

    Args:
        size: `run.size`.
        model: the `model` group, resolved or as a config.yaml has it. Where that says no shape, the size is returned.
    """
    shape = _shape(model)
    if shape is None or (SIZES.get(str(size)), VOCABULARY) == shape:
        return str(size or "?")
    return format_count(parameter_count(*shape))


def long_name(size: object, model: object) -> str:
    """Return `16.9M parameters, 7 layers x 256`, and for a model of another shape than its size's also that it is
    `(from 17m)`; empty where the group says no shape. Args as in `short_name`."""
    found = _shape(model)
    if found is None:
        return ""
    shape, vocabulary = found
    other = f", vocabulary {vocabulary:,}" if vocabulary != VOCABULARY else ""
    origin = f" (from {size})" if size in SIZES and short_name(size, model) != size else ""
    told = f"{format_count(parameter_count(shape, vocabulary))} parameters"
    return f"{told}, {shape.num_layers} layers x {shape.hidden_size:,}{other}{origin}"


def _shape(model: object) -> tuple[Shape, int] | None:
    def value(key: str) -> Any:
        return model.get(key) if isinstance(model, Mapping) else getattr(model, key, None)

    keys = [field.name for field in dataclasses.fields(Shape)]
    numbers = [value(key) for key in (*keys, "vocab_size")]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return Shape(*numbers[:-1]), numbers[-1]
