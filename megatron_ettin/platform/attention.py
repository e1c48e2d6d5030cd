"""Choose the attention kernel of `runtime.attention` and say why.

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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.platform.device import Platform


@dataclass(frozen=True)
class AttentionChoice:
    """A kernel's name and the reason it was chosen."""

    name: str
    why: str


def choose_attention(wanted: str, platform: Platform, precision: str) -> AttentionChoice:
    """Return the kernel for `runtime.attention`; `auto` is the first of the table that runs here.

    Raises:
        UserError: the requested kernel does not run here; the message says why and names one that does.
    """
    reasons = {name: missing(platform, precision) for name, missing in KERNELS.items()}
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


# in the order in which `auto` tries them; flex comes after sdpa, so never, because it compiles for minutes
KERNELS: dict[str, Callable[[Platform, str], str | None]] = {
    "te-fused": _te_fused,
    "flash": _flash,
    "varlen": _varlen,
    "sdpa": lambda platform, precision: None,
    "flex": _flex,
}
