"""List the published shapes, the objectives and the precisions, and name models.

Shapes are those of the Ettin configurations (std/<size>/*.yaml, lines 24-27). Their parameter counts equal those of
`transformers`' ModernBERT classes at vocabulary 50,368 with a tied output (the same for encoder and decoder).

Encoder and decoder differ in their objective and in nothing else. A row of the batch is read in one of three ways
(`ROW_OBJECTIVES`), and an objective names those that its rows may have. `mntp` is masked next-token prediction (the
hidden state before a masked token predicts it), by which the original trainer trained decoders on as encoders. The
`hybrid` ones mix causal and masked rows in one model, as GPT-BERT does (arXiv 2410.24159).

FP8 and MXFP8 run in Transformer Engine's linear layers only. A model is named by its published size where its shape is
exactly that one, else by its number of parameters: `run.size` names the recipe that a run began with, and its keys may
have given the model any other shape since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_ettin.base.text import format_count

if TYPE_CHECKING:
    from megatron_ettin.config.schema import ModelConfig

VOCABULARY = 50_368
HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """One published width and depth. Every head has 64 channels."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of the gated MLP: Wi has twice as many rows."""
    num_attention_heads: int


SIZES = {
    "17m": Shape(7, 256, 384, 4),
    "32m": Shape(10, 384, 576, 6),
    "68m": Shape(19, 512, 768, 8),
    "150m": Shape(22, 768, 1152, 12),
    "400m": Shape(28, 1024, 2624, 16),
    "1b": Shape(28, 1792, 3840, 28),
}


# what has a shape, for counting parameters
HasShape: TypeAlias = "Shape | ModelConfig"


def layer_parameter_count(shape: HasShape) -> int:
    """Return the weights of one layer's four matrices: Wqkv and Wo (4 H^2), Wi and mlp.Wo (3 H F)."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return 4 * hidden * hidden + 3 * hidden * ffn


def parameter_count(shape: HasShape, vocab_size: int = VOCABULARY) -> int:
    """Return the exact number of parameters.

    They are V H + L (4 H^2 + 3 H F) + (1 + (L-1) + L + 1) H of norms + H^2 + H + V of the head.
    """
    hidden, layers = shape.hidden_size, shape.num_layers
    norms = (1 + (layers - 1) + layers + 1) * hidden
    head = hidden * hidden + hidden
    return vocab_size * hidden + layers * layer_parameter_count(shape) + norms + head + vocab_size


def tensor_parallel_degrees(shape: HasShape) -> list[int]:
    """Return the degrees that divide both the heads and the MLP's inner width; core pads the vocabulary."""
    heads, ffn = shape.num_attention_heads, shape.ffn_hidden_size
    return [tp for tp in range(1, heads + 1) if heads % tp == 0 and ffn % tp == 0]


# the label of a position that predicts nothing
IGNORE = -100


@dataclass(frozen=True)
class RowObjective:
    """Way of reading a row: whether attention is causal, tokens are masked, and position i predicts i + 1."""

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
    """A training objective."""

    row_objectives: tuple[str, ...]
    """Row objectives. Where there are two, the first is causal and `data.clm_fraction` is its share."""
    exports: tuple[str, ...]
    """Objectives of the models that its weights can be exported as; the first is the default."""

    @property
    def needs_mask_token(self) -> bool:
        """Return whether some of its rows have masked tokens."""
        return self.masked_objective is not None

    @property
    def masked_objective(self) -> str | None:
        """Return the row objective that masks tokens; None where there is none."""
        return next((name for name in self.row_objectives if ROW_OBJECTIVES[name].masks), None)

    @property
    def is_hybrid(self) -> bool:
        """Return whether it mixes causal and masked rows."""
        return len(self.row_objectives) > 1

    @property
    def causal(self) -> bool:
        """Return whether all rows are causal."""
        return all(ROW_OBJECTIVES[name].causal for name in self.row_objectives)


OBJECTIVES = {
    "mlm": Objective(("mlm",), ("mlm",)),
    "clm": Objective(("clm",), ("clm",)),
    "mntp": Objective(("mntp",), ("mlm",)),
    "hybrid": Objective(("clm", "mlm"), ("mlm", "clm")),
    "hybrid_mntp": Objective(("clm", "mntp"), ("mlm", "clm")),
}
# what a checkpoint can be exported as: an encoder or a decoder of transformers
EXPORTED = ("mlm", "clm")


@dataclass(frozen=True)
class Precision:
    """A number format."""

    compute: str
    """Type of weights and activations outside of FP8 linear layers: "fp32" or "bf16"."""
    fp8_recipe: str | None = None
    """Name of the FP8 recipe, as core's TransformerConfig takes it."""
    multiple: int = 1
    """hidden_size / tp and ffn_hidden_size / tp must be multiples of it."""


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
        model: the `model` group, resolved or as a config.yaml has it. Where it has no shape, the size is returned.
    """
    shape = _shape(model)
    if shape is None or (SIZES.get(str(size)), VOCABULARY) == shape:
        return str(size or "?")
    return format_count(parameter_count(*shape))


def long_name(size: object, model: object) -> str:
    """Return `16.9M parameters, 7 layers x 256`; empty where the group has no shape. Args as in `short_name`.

    `(from 17m)` is added where the shape is not that of the size.
    """
    known = _shape(model)
    if known is None:
        return ""
    shape, vocabulary = known
    other = f", vocabulary {vocabulary:,}" if vocabulary != VOCABULARY else ""
    origin = f" (from {size})" if size in SIZES and short_name(size, model) != size else ""
    parameters = format_count(parameter_count(shape, vocabulary))
    return f"{parameters} parameters, {shape.num_layers} layers x {shape.hidden_size:,}{other}{origin}"


def _shape(model: object) -> tuple[Shape, int] | None:
    def value(key: str) -> Any:
        return model.get(key) if isinstance(model, Mapping) else getattr(model, key, None)

    keys = [field.name for field in dataclasses.fields(Shape)]
    numbers = [value(key) for key in (*keys, "vocab_size")]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return Shape(*numbers[:-1]), numbers[-1]


def published_size(model: object) -> str | None:
    """Return the published size that has the model's shape, whatever its vocabulary; None where there is none."""
    known = _shape(model)
    return next((size for size, shape in SIZES.items() if known is not None and shape == known[0]), None)
