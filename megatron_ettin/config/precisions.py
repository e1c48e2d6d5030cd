"""Precisions by name: the type of weights and activations, and the FP8 recipe where there is one.

FP8 and MXFP8 run in Transformer Engine's linears only; `multiple` is what hidden/tp and ffn/tp must be divisible by."""

from __future__ import annotations

from dataclasses import dataclass


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
