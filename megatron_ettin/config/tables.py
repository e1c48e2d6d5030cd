"""List the published shapes, the objectives, the precisions and the sizes of chunks of work, and name models.

Shapes are those of the Ettin configurations (std/<size>/*.yaml, lines 24-27). Their parameter counts equal those of
`transformers`' ModernBERT classes at vocabulary 50,368 with a tied output (the same for encoder and decoder).

Encoder and decoder differ only in their objective. A row of the batch has one of three row objectives
(`ROW_OBJECTIVES`), and a training objective lists those that its rows may have. `mntp` is masked next-token prediction:
the hidden state before a masked token predicts it. With it the original trainer continued decoders as encoders.
`hybrid` and `hybrid_mntp` mix causal and masked rows in one model, as GPT-BERT does (arXiv 2410.24159).

FP8 and MXFP8 run in Transformer Engine's linear layers only. A model is named by its published size if it has exactly
that shape, else by its number of parameters, because `run.size` names only the recipe that a run started from: other
keys may change the shape.
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


# types whose parameters can be counted
HasShape: TypeAlias = "Shape | ModelConfig"


def layer_parameter_count(shape: HasShape) -> int:
    """Return the number of weights in one layer's four matrices: Wqkv and Wo (4 H^2), Wi and mlp.Wo (3 H F)."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return 4 * hidden * hidden + 3 * hidden * ffn


def parameter_count(shape: HasShape, vocab_size: int = VOCABULARY) -> int:
    """Return the exact number of parameters.

    It is V H (embedding) + L (4 H^2 + 3 H F) (layers) + (1 + (L-1) + L + 1) H (norms) + H^2 + H + V (head).
    """
    hidden, layers = shape.hidden_size, shape.num_layers
    norms = (1 + (layers - 1) + layers + 1) * hidden
    head = hidden * hidden + hidden
    return vocab_size * hidden + layers * layer_parameter_count(shape) + norms + head + vocab_size


def tensor_parallel_degrees(shape: HasShape) -> list[int]:
    """Return the tensor-parallel degrees that divide the heads and the MLP's inner width. Core pads the vocabulary."""
    heads, ffn = shape.num_attention_heads, shape.ffn_hidden_size
    return [tp for tp in range(1, heads + 1) if heads % tp == 0 and ffn % tp == 0]


# the label of a position that predicts nothing
IGNORE = -100


@dataclass(frozen=True)
class RowObjective:
    """Reading of a row: whether attention is causal, tokens are masked, and position i predicts i + 1."""

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
    """Row objectives. If there are two, the first is causal and `data.clm_fraction` is the share of its rows."""
    exports: tuple[str, ...]
    """Objectives of the models that its weights can be exported as; the first is the default."""

    @property
    def needs_mask_token(self) -> bool:
        """Return whether some rows of this objective have masked tokens."""
        return self.masked_objective is not None

    @property
    def masked_objective(self) -> str | None:
        """Return the row objective that masks tokens; None if there is none."""
        return next((name for name in self.row_objectives if ROW_OBJECTIVES[name].masks), None)

    @property
    def is_hybrid(self) -> bool:
        """Return whether this objective mixes causal and masked rows."""
        return len(self.row_objectives) > 1

    @property
    def causal(self) -> bool:
        """Return whether all rows of this objective are causal."""
        return all(ROW_OBJECTIVES[name].causal for name in self.row_objectives)


OBJECTIVES = {
    "mlm": Objective(("mlm",), ("mlm",)),
    "clm": Objective(("clm",), ("clm",)),
    "mntp": Objective(("mntp",), ("mlm",)),
    "hybrid": Objective(("clm", "mlm"), ("mlm", "clm")),
    "hybrid_mntp": Objective(("clm", "mntp"), ("mlm", "clm")),
}
# objectives of the transformers models that a checkpoint can be exported as: an encoder or a decoder
EXPORTED = ("mlm", "clm")


@dataclass(frozen=True)
class Precision:
    """A number format."""

    compute: str
    """Type of weights and activations outside of FP8 linear layers: "fp32" or "bf16"."""
    fp8_recipe: str | None = None
    """Name of the FP8 recipe, as core's TransformerConfig takes it."""
    multiple: int = 1
    """Number that hidden_size / tp and ffn_hidden_size / tp must be multiples of."""


PRECISIONS = {
    "fp32": Precision("fp32"),
    "bf16": Precision("bf16"),
    "fp8-delayed": Precision("bf16", "delayed", 16),
    "fp8-current": Precision("bf16", "tensorwise", 16),
    "fp8-blockwise": Precision("bf16", "blockwise", 128),
    "mxfp8": Precision("bf16", "mxfp8", 32),
}


# The sizes below decide how much memory the model's computations need, which a plan predicts without the model.
# tokens per block of attention in bands; windows are rounded up to whole blocks
BAND = 64
# rows up to this length attend densely with a mask, which costs less than many small calls
DENSE_ROW_TOKENS = 192
# bytes of fp32 logits that are in memory at the same time; large enough for efficient matrix products
CHUNK_LOGITS_BYTES = 64 * 2**20
# fewest rows of logits that are computed at a time, however large the vocabulary is
FEWEST_CHUNK_ROWS = 64
# rows of logits that fill a GPU; two bf16 tensors of 0.4 GB at the recipe's vocabulary
DEVICE_CHUNK_ROWS = 4_096


def short_name(size: object, model: object) -> str:
    """Return a published size such as `17m` if the model has its shape and vocabulary, else a count such as `176K`.

    Args:
        size: `run.size`.
        model: the `model` group, resolved or as stored in a config.yaml. If it has no shape, the size is returned.
    """
    shape = _shape(model)
    if shape is None or (SIZES.get(str(size)), VOCABULARY) == shape:
        return str(size or "?")
    return format_count(parameter_count(*shape))


def long_name(size: object, model: object) -> str:
    """Return a description such as `16.9M parameters, 7 layers x 256`; empty if the group has no shape.

    A model whose shape is not that of its size gets `(from 17m)` at the end. The arguments are those of `short_name`.
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
    """Return the published size that has the model's shape, whatever its vocabulary; None if there is none."""
    known = _shape(model)
    return next((size for size, shape in SIZES.items() if known is not None and shape == known[0]), None)
