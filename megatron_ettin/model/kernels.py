"""Attention of packed rows by kernels that take boundaries and a window themselves. All are called alike:
kernel(q, k, v, packed, window, causal) -> out, tensors [tokens, heads, dim], `window` as in attention.py.

`sdpa` is attention.py's `attend`; these want a GPU. Windows here are (keys to the left, keys to the right), both
inclusive, -1 without end, as flash-attention counts them (arXiv 2307.08691)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_ettin.model.attention import allowed
from megatron_ettin.model.packed import PackedRows


def window_sides(window: int | None, causal: bool) -> tuple[int, int]:
    """A layer's window as flash-attention counts it."""
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    return (window - 1, 0) if causal else (window, window)


def attend_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """torch's own flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    found = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window_sides(window, causal))
    assert isinstance(found, torch.Tensor)  # it returns more only where more is asked for
    return found


def attend_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """The flash-attn package: version 3 where it is installed (Hopper), else 2."""
    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    found = _flash_function()(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal,
        window_size=window_sides(window, causal), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return found[0] if isinstance(found, tuple) else found


@cache
def _flash_function() -> Any:
    try:
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    return flash_attn_varlen_func


def attend_flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """torch's flex attention: blocks of 128 x 128 that no chunk or window reaches are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    segments, positions, tokens = packed.segments, packed.positions, len(q)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        near = allowed(positions[query], positions[key], window, causal)
        return (segments[query] == segments[key]) & near

    mask = packed.once(
        ("flex", window, causal), lambda: create_block_mask(sees, None, None, tokens, tokens, device=q.device)
    )
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return _flex()(q, k, v, block_mask=mask)[0].transpose(0, 1)


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
