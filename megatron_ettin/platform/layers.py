"""Choose the classes of a transformer layer's parts: Transformer Engine's on a GPU that has it, else core's own.

The idea is core's BackendSpecProvider; this one is smaller because an Ettin layer has four parts only.

`make_overlap_buffers` makes the buffers ("userbuffers") with which Transformer Engine's layers communicate over tensor
parallelism while they multiply matrices. They have one shape, are made before the model and freed after it.

`choose_attention` chooses the attention kernel of `runtime.attention` and says why:

| name | kernel | needs |
|---|---|---|
| te-fused | cuDNN's, by Transformer Engine | a GPU, Transformer Engine 2.12, 16-bit |
| flash | the flash-attn package (3, else 2) | a GPU, the package, 16-bit |
| varlen | torch's own flash attention | a GPU, torch with a window in `varlen_attn`, 16-bit |
| flex | torch's compiled flex attention | a GPU, Triton |
| sdpa | torch's scaled_dot_product_attention, chunk by chunk or in bands | nothing |
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.platform.device import Platform


@dataclass(frozen=True)
class AttentionChoice:
    """A kernel's name and the reason it was chosen."""

    name: str
    why: str


@dataclass(frozen=True)
class LayerBackend:
    """Classes of a layer's parts, and the attention kernel."""

    name: str
    column_linear: Any
    row_linear: Any
    attention: AttentionChoice
    norm_column_linear: Any = None
    """Column-parallel linear fused with the norm before it; None: the layer has separate norms."""
    core_attention: Any = None
    """Transformer Engine's attention class; None if `attention` is another kernel."""
    fuses_weight_gradients: bool = False
    """Whether products add a weight's gradient to its fp32 buffer themselves."""


def layer_backend(platform: Platform, precision: str, attention: str = "auto") -> LayerBackend:
    """Return Transformer Engine's layer classes if they run on this platform, else core's.

    In fp32 they are core's, because Transformer Engine would compute in TF32.

    Args:
        platform: this rank's device.
        precision: value of `precision.name`.
        attention: value of `runtime.attention`.

    Raises:
        UserError: the requested attention kernel does not run on this platform.
    """
    choice = choose_attention(attention, platform, precision)
    # core stores its choice in these variables, and refuses another choice later in this process
    for name in ("FLASH", "FUSED", "UNFUSED"):
        os.environ.pop(f"NVTE_{name}_ATTN", None)
    with warnings.catch_warnings():
        # core warns about every optional package it does not find
        warnings.simplefilter("ignore")
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    if PRECISIONS[precision].compute == "fp32" or not platform.has_transformer_engine:
        # a part of NVIDIA's Apex
        fuses = platform.is_gpu and find_spec("fused_weight_gradient_mlp_cuda") is not None
        return LayerBackend("local", ColumnParallelLinear, RowParallelLinear, choice, fuses_weight_gradients=fuses)
    from megatron.core.extensions import transformer_engine as te

    return LayerBackend(
        "transformer_engine",
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        choice,
        _bias_free_norm_linear(),
        te.TEDotProductAttention if choice.name == "te-fused" else None,
        fuses_weight_gradients=True,
    )


@cache
def _bias_free_norm_linear() -> Any:
    """Return Transformer Engine's fused LayerNorm and column-parallel linear, without the norm's bias.

    TE's LayerNorm always has a bias; the recipe's norms have none. This class makes it a buffer of zeros instead of
    a parameter: nothing trains, counts, reduces (DeepSpeed would) or saves it, and names in checkpoints equal the local
    layers'.
    """
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    class BiasFreeNormColumnLinear(TELayerNormColumnParallelLinear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bias = self.layer_norm_bias
            del self.layer_norm_bias
            self.register_buffer("layer_norm_bias", torch.zeros_like(bias.data), persistent=False)

    return BiasFreeNormColumnLinear


def choose_attention(wanted: str, platform: Platform, precision: str) -> AttentionChoice:
    """Return the kernel for `runtime.attention`; `auto` is the first of MISSING_FOR that runs on this platform.

    Raises:
        UserError: the requested kernel does not run on this platform; the message says why and names one that does.
    """
    reasons = {name: missing(platform, precision) for name, missing in MISSING_FOR.items()}
    nearest = next(name for name, reason in reasons.items() if reason is None)
    if wanted == "auto":
        passed = [f"{name} {reason}" for name, reason in reasons.items() if reason is not None]
        before = passed[: list(reasons).index(nearest)]
        return AttentionChoice(nearest, "; ".join(before) or "the first choice")
    if reasons[wanted] is not None:
        raise UserError(f"runtime.attention: {wanted} {reasons[wanted]}; the nearest that runs is {nearest}")
    return AttentionChoice(wanted, "requested")


def _16_bit_on_gpu(platform: Platform, precision: str) -> str | None:
    if not platform.is_gpu:
        return "needs a GPU, found none"
    return "has no fp32" if PRECISIONS[precision].compute == "fp32" else None


def _te_fused(platform: Platform, precision: str) -> str | None:
    if platform.missing_for_transformer_engine is not None:
        return platform.missing_for_transformer_engine
    return "has no fp32" if PRECISIONS[precision].compute == "fp32" else None


def _flash(platform: Platform, precision: str) -> str | None:
    if find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None:
        return "needs the flash-attn package, which is not installed"
    return _16_bit_on_gpu(platform, precision)


def _varlen(platform: Platform, precision: str) -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "needs torch.nn.attention.varlen, which this torch lacks"
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return "needs a varlen_attn with windows, which this torch lacks"
    return _16_bit_on_gpu(platform, precision)


def _flex(platform: Platform, precision: str) -> str | None:
    if not platform.is_gpu:
        return "needs a GPU, found none (it has no backward on a CPU)"
    return None if find_spec("triton") else "needs Triton, which is not installed"


# kernel -> function that returns the reason why it does not run, or None; in the order in which `auto` tries them.
# `auto` never takes flex, which compiles for minutes: it comes after sdpa, which always runs.
MISSING_FOR: dict[str, Callable[[Platform, str], str | None]] = {
    "te-fused": _te_fused,
    "flash": _flash,
    "varlen": _varlen,
    "sdpa": lambda platform, precision: None,
    "flex": _flex,
}


def make_overlap_buffers(tokens: int, hidden_size: int, tp: int, fp8: bool, bf16: bool) -> None:
    """Make the buffers for micro-batches of `tokens` tokens over all tensor-parallel ranks (collective).

    `fp8` and `bf16` say whether there are layers of that precision, each of which has its own buffers.
    """
    from transformer_engine.pytorch.module import base

    mode = base.UserBufferQuantizationMode
    modes = [one for one, wanted in ((mode.FP8, fp8), (mode.NONE, bf16)) if wanted]
    base.initialize_ub([tokens, hidden_size], tp, quantization_modes=modes, bootstrap_backend="nccl")


def free_overlap_buffers() -> None:
    """Free the buffers of `make_overlap_buffers`."""
    from transformer_engine.pytorch.module import base

    base.destroy_ub()
