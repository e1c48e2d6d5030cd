"""Call the GPU kernels for attention of packed rows that take boundaries and a window themselves.

All are called as kernel(q, k, v, packed, window, causal) -> out with tensors [tokens, heads, dim] and `window` as in
attention.py, whose `attend` is the kernel called `sdpa`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_ettin.model.attention import allowed, window_sides
from megatron_ettin.model.packed import PackedRows


def attend_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend by torch's own flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window_sides(window, causal))
    # a tuple only where its auxiliary outputs are requested
    assert isinstance(out, torch.Tensor)
    return out


def attend_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend by the flash-attn package: version 3 where it is installed (Hopper), else 2."""
    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = _flash_function()(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal,
        window_size=window_sides(window, causal), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    attended: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return attended


@cache
def _flash_function() -> Any:
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func


def attend_flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend by torch's flex attention, skipping blocks of 128 x 128 outside of every chunk and window."""
    from torch.nn.attention.flex_attention import create_block_mask

    segments, positions, tokens = packed.segments, packed.positions, len(q)

    def is_visible(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        near = allowed(positions[query], positions[key], window, causal)
        return (segments[query] == segments[key]) & near

    mask = packed.cached(
        ("flex", window, causal), lambda: create_block_mask(is_visible, None, None, tokens, tokens, device=q.device)
    )
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out: torch.Tensor = _flex()(q, k, v, block_mask=mask)
    return out[0].transpose(0, 1)


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
