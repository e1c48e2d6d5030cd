"""cuDNN's fused attention on packed rows (THD), with a window on either side."""

from __future__ import annotations

import itertools
from typing import Any

import torch

KERNELS = ["get_fused_attn_backend", "fused_attn_fwd", "fused_attn_bwd"]


def get_fused_attn_backend(
    is_training: bool,
    q_dtype: Any,
    kv_dtype: Any,
    layout: Any,
    bias: Any,
    mask: Any,
    softmax: Any,
    dropout: float,
    heads: int,
    groups: int,
    max_q: int,
    max_kv: int,
    head_dim_qk: int,
    head_dim_v: int,
    left: int,
    right: int,
    return_max_logit: bool,
    cuda_graph: bool,
    deterministic: bool,
) -> Any:
    """Return F16_arbitrary_seqlen for the arguments that are emulated, and no backend for any others."""
    import transformer_engine_torch as tex

    backends = tex.NVTE_Fused_Attn_Backend
    runs = (
        q_dtype in (tex.DType.kBFloat16, tex.DType.kFloat16)
        and layout == tex.NVTE_QKV_Layout.NVTE_THD_THD_THD
        and bias == tex.NVTE_Bias_Type.NVTE_NO_BIAS
        and mask in (tex.NVTE_Mask_Type.NVTE_PADDING_MASK, tex.NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK)
        and softmax == tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
        and dropout == 0.0
        and head_dim_qk % 8 == 0
        and head_dim_qk <= 256
        and heads == groups
    )
    return backends.NVTE_F16_arbitrary_seqlen if runs else backends.NVTE_No_Backend


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float, mask: Any, window: Any
) -> torch.Tensor:
    """Attend within each sequence: masked softmax of [tokens, heads, channels] in fp32; tokens of no sequence give zero."""
    out = torch.zeros_like(q, dtype=torch.float32)
    left, right = window
    if mask.name == "NVTE_PADDING_CAUSAL_MASK":
        right = 0
    pieces, ends = [], bounds.tolist()
    for first, last in itertools.pairwise(ends):
        if first == last:
            continue
        query, key, value = (t[first:last].float().transpose(0, 1) for t in (q, k, v))
        position = torch.arange(last - first)
        # key - query
        ahead = position[None] - position[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        pieces.append((scores.softmax(-1) @ value).transpose(0, 1))
    done = torch.cat(pieces) if pieces else out[:0]
    return torch.cat([done, out[len(done) :]])


def fused_attn_fwd(
    max_q: int,
    max_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    bias_type: Any,
    mask: Any,
    softmax: Any,
    window: tuple[int, int],
    bottom_right: bool,
    bounds_q: torch.Tensor,
    bounds_kv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    *rest: Any,
) -> list[torch.Tensor]:
    """Return [result, softmax statistics, random state]. No sequence may be longer than `max_q`."""
    assert bounds_q.dtype == bounds_kv.dtype == torch.int32
    assert torch.equal(bounds_q, bounds_kv)
    assert int(bounds_q.diff().max()) <= max_q, "sequences longer than the rows"
    assert int(bounds_q[-1]) <= len(q), "sequences longer than the rows"
    with torch.no_grad():
        out = _attend(q, k, v, bounds_q, scale, mask, window)
    stats = torch.zeros(len(q), q.shape[1], 1)
    return [out.to(dtype), stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int,
    max_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    bias_type: Any,
    mask: Any,
    softmax: Any,
    window: tuple[int, int],
    bottom_right: bool,
    deterministic: bool,
    bounds_q: torch.Tensor,
    bounds_kv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    gradient: torch.Tensor,
    *rest: Any,
) -> list[torch.Tensor | None]:
    """Return gradients of query, key and value, and None for bias and offset."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        again = _attend(*inputs, bounds_q, scale, mask, window)
        actual = torch.autograd.grad(again, inputs, gradient.view_as(again).float())
    return [*(g.to(q.dtype) for g in actual), None, None]
