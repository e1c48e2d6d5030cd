"""Which class plays each role in a transformer layer: Transformer Engine's on a GPU that has it, core's own elsewhere.

The idea is core's BackendSpecProvider; this table is smaller because an Ettin layer needs four roles only."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.platform.attention import AttentionChoice, choose_attention
from megatron_ettin.platform.device import Platform


@dataclass(frozen=True)
class LayerBackend:
    """`norm_column_linear` fuses the norm before it (None: the layer has a norm of its own); `core_attention` is the
    class of Transformer Engine to wrap where `attention` is its kernel."""

    name: str
    column_linear: Any
    row_linear: Any
    attention: AttentionChoice
    norm_column_linear: Any = None
    core_attention: Any = None
    fuses_weight_gradients: bool = False  # products that add a weight's gradient to its fp32 buffer themselves


def layer_backend(platform: Platform, precision: str, attention: str = "auto") -> LayerBackend:
    """Transformer Engine's layers where they run, else core's. In fp32 core's: TE's products would be TF32.
    `attention`: run.attention. Raises UserError for one that does not run here."""
    choice = choose_attention(attention, platform, precision)
    for name in ("FLASH", "FUSED", "UNFUSED"):  # core notes its choice there, and refuses any other in this process
        os.environ.pop(f"NVTE_{name}_ATTN", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # core warns of every optional package it does not find
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    if PRECISIONS[precision].compute == "fp32" or not platform.has_transformer_engine:
        fuses = platform.is_gpu and find_spec("fused_weight_gradient_mlp_cuda") is not None  # of NVIDIA's Apex
        return LayerBackend("local", ColumnParallelLinear, RowParallelLinear, choice, fuses_weight_gradients=fuses)
    from megatron.core.extensions import transformer_engine as te

    from megatron_ettin.platform.norm_linear import BiasFreeNormColumnLinear

    return LayerBackend(
        "transformer_engine",
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        choice,
        BiasFreeNormColumnLinear,
        te.TEDotProductAttention if choice.name == "te-fused" else None,
        fuses_weight_gradients=True,
    )
