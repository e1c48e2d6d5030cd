"""Which class plays each role in a transformer layer: Transformer Engine's on a GPU that has it, core's own elsewhere.

The idea is core's BackendSpecProvider; this table is smaller because an Ettin layer needs four roles only."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.platform.device import Platform, have_transformer_engine


@dataclass(frozen=True)
class LayerBackend:
    """`norm_column_linear` fuses the norm before it (None: the layer has a norm of its own); `core_attention` is the
    kernel to wrap (None: torch's scaled_dot_product_attention)."""

    name: str
    column_linear: Any
    row_linear: Any
    norm_column_linear: Any = None
    core_attention: Any = None


def layer_backend(platform: Platform, precision: str) -> LayerBackend:
    """Transformer Engine's layers where they run, else core's. In fp32 core's: TE's products would be TF32, and its
    fp32 attention holds every score."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # core warns of every optional package it does not find
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    if PRECISIONS[precision].compute == "fp32" or not (platform.is_gpu and have_transformer_engine()):
        return LayerBackend("local", ColumnParallelLinear, RowParallelLinear)
    from megatron.core.extensions import transformer_engine as te

    from megatron_ettin.platform.te_norm_linear import BiasFreeNormColumnLinear

    return LayerBackend(
        "transformer_engine",
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        BiasFreeNormColumnLinear,
        te.TEDotProductAttention,
    )
