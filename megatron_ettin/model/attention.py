"""Compute attention over packed rows: rotary embedding, context parallelism, masks by chunk boundaries and windows.

With torch's scaled_dot_product_attention, three functions compute the same masked softmax (RECIPE section 2) and differ
in cost only: `attend_dense` masks whole rows (short rows), `attend_chunks` runs one unmasked attention per chunk (no
work across boundaries), `attend_bands` splits rows into blocks that see only the blocks in reach of the window.
`attend_varlen`, `attend_flash` and `attend_flex` call GPU kernels that take boundaries and a window themselves, and
`TransformerEngineAttention` runs TE's kernel with cu_seqlens and the window.

Rotary position embedding (RoPE) is non-interleaved and covers the whole head; positions restart at every chunk. Source:
Su et al. 2021 (arXiv 2104.09864), in the half-split form of GPT-NeoX and ModernBERT: channel c pairs with c + dim/2 and
turns by position * theta^(-2c/dim). Local and global layers have their own thetas.

Context parallelism is DeepSpeed-Ulysses (arXiv 2309.14509): between layers a rank holds a slice of every row. One
all-to-all before the attention exchanges tokens for heads, one after it exchanges them back. Between the two runs the
ordinary packed attention with any window and boundaries, on every device. The price: tp x cp must divide the heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

from megatron_ettin.config.tables import BAND, DENSE_ROW_TOKENS
from megatron_ettin.model.config import EttinTransformerConfig
from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import maybe_compile

MASKS = {True: AttnMaskType.padding_causal, False: AttnMaskType.padding}

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedRows, int | None, bool], torch.Tensor]


class _RotaryAttention(MegatronModule):
    """Base of both attention classes: theta and windows of the layer, rotation, context parallelism.

    `layer_number` counts from 1, as in core. Causal rows come first in a micro-batch; if it has other rows too,
    `attend` is called once for each part.
    """

    def __init__(self, config: EttinTransformerConfig, layer_number: int, pg_collection: Any = None) -> None:
        super().__init__(config=config)
        self.context_group = None if pg_collection is None or pg_collection.cp.size() == 1 else pg_collection.cp
        self.is_global = (layer_number - 1) % config.global_attention_every == 0
        self.theta = config.global_rope_theta if self.is_global else config.local_rope_theta
        # keyed by whether rows are causal; None: no window
        self.windows = dict.fromkeys((True, False)) if self.is_global else config.attention_windows
        self.causal = config.causal

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
        *, packed_seq_params: PackedRows, **arguments: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Return [tokens, heads * dim] for query, key, value [tokens, heads, dim] of this rank's slices of the rows."""
        packed, group = packed_seq_params, self.context_group
        if group is not None:
            query, key, value = to_heads((query, key, value), packed.rows, group)
        cos, sin = rotary_tables(packed, query.shape[-1], self.theta, query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        outs, begin = [], 0
        for part, causal in packed.split_causal(self.causal):
            end = begin + part.rows * part.seq_len
            attended = self.attend((query[begin:end], key[begin:end], value[begin:end]), part, causal, arguments)
            outs.append(attended.view_as(query[begin:end]))
            begin = end
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return (out if group is None else to_tokens(out, packed.rows, group)).flatten(1)

    def attend(self, qkv: Qkv, part: PackedRows, causal: bool, arguments: dict[str, Any]) -> torch.Tensor:
        """Attend within the rows of `part`, all causal or all not.

        `qkv` and the result are [tokens, heads, dim]; `arguments` are core's further arguments.
        """
        raise NotImplementedError


class KernelAttention(_RotaryAttention):
    """Attention by a function of boundaries and window: `attend` (the default), or that of a GPU kernel."""

    def __init__(
        self,
        config: EttinTransformerConfig,
        layer_number: int,
        kernel: Kernel | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        self.kernel = kernel or attend

    def attend(self, qkv: Qkv, part: PackedRows, causal: bool, arguments: dict[str, Any]) -> torch.Tensor:
        """Attend by the kernel, with the layer's window for causal rows or for other rows."""
        out: torch.Tensor = self.kernel(*qkv, part, self.windows[causal], causal)
        return out


class TransformerEngineAttention(_RotaryAttention):
    """Rotation, then TE's fused or flash kernel on [tokens, heads, dim] with cu_seqlens and the layer's window."""

    def __init__(self, config: EttinTransformerConfig, layer_number: int, kernel: Any, **arguments: Any) -> None:
        super().__init__(config, layer_number, arguments.get("pg_collection"))
        # TE fixes the window when a kernel is built, so a hybrid model needs two; they hold no weights
        self.kernels = torch.nn.ModuleDict()
        for causal in {True, False} if config.hybrid else {self.causal}:
            # core's class reads the window and the heads that reach the kernel from its configuration
            layer_config = copy.copy(config)
            window = self.windows[causal]
            layer_config.window_size = None if window is None else window_sides(window, causal)
            layer_config.window_attn_skip_freq = None
            if self.context_group is not None:
                layer_config.num_attention_heads //= self.context_group.size()
                layer_config.num_query_groups = layer_config.num_attention_heads
            mask = {"attn_mask_type": MASKS[causal]}
            self.kernels[str(causal)] = kernel(config=layer_config, layer_number=layer_number, **arguments | mask)

    def attend(self, qkv: Qkv, part: PackedRows, causal: bool, arguments: dict[str, Any]) -> torch.Tensor:
        """Attend by TE's kernel for causal rows or by that for other rows."""
        named = {**arguments, "attn_mask_type": MASKS[causal], "packed_seq_params": part}
        out: torch.Tensor = self.kernels[str(causal)](*qkv, None, **named)
        return out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend by the function that costs least for this row length and window; tensors are [tokens, heads, dim]."""
    longest = packed.max_seqlen_q or packed.seq_len
    if packed.seq_len <= DENSE_ROW_TOKENS:
        return attend_dense(q, k, v, packed, window, causal)
    if window is None or longest <= window:
        return attend_chunks(q, k, v, packed, causal)
    return attend_bands(q, k, v, packed, window, causal)


def allowed(query: torch.Tensor, key: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
    """Return whether a query position may see a key position, by causality and window alone."""
    distance = query - key
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & ((distance < window) if causal else (distance.abs() <= window))
    return mask


def window_sides(window: int | None, causal: bool) -> tuple[int, int]:
    """Return a window as flash-attention (arXiv 2307.08691) and TE count it.

    That is (keys to the left, keys to the right), both inclusive; -1 is unlimited.
    """
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    return (window - 1, 0) if causal else (window, window)


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend within whole rows under a [rows, 1, seq_len, seq_len] mask."""

    def make() -> torch.Tensor:
        segments = packed.segments.view(-1, packed.seq_len)
        offset = torch.arange(packed.seq_len, device=segments.device)
        near = allowed(offset[:, None], offset[None], window, causal)
        return ((segments[:, :, None] == segments[:, None, :]) & near)[:, None]

    mask = packed.cached(("dense", window, causal), make)
    q, k, v = (t.unflatten(0, (-1, packed.seq_len)).transpose(1, 2) for t in (q, k, v))
    out: torch.Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)


def attend_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, causal: bool) -> torch.Tensor:
    """Attend chunk by chunk: nothing is computed across boundaries and no mask exists."""
    outs = []
    for chunk in zip(*(t.split(packed.chunk_lengths) for t in (q, k, v)), strict=True):
        query, key, value = (t.transpose(0, 1)[None] for t in chunk)
        outs.append(functional.scaled_dot_product_attention(query, key, value, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(outs)


def attend_bands(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int, causal: bool
) -> torch.Tensor:
    """Attend from blocks of BAND queries to the blocks in reach: scores [rows * blocks, heads, BAND, reach * BAND]."""
    before = -(-(window - 1 if causal else window) // BAND)
    after = 0 if causal else before
    rows, blocks = packed.rows, -(-packed.seq_len // BAND)
    padding = blocks * BAND - packed.seq_len

    # [tokens, h, d] -> [rows, left+blocks+right, BAND, h, d]
    def blocked(t: torch.Tensor, left: int, right: int) -> torch.Tensor:
        t = t.unflatten(0, (rows, packed.seq_len))
        padded: torch.Tensor = functional.pad(t, (0, 0, 0, 0, left * BAND, padding + right * BAND)).unflatten(
            1, (-1, BAND)
        )
        return padded

    # [tokens, h, d] -> [rows * blocks, h, reach * BAND, d]
    def reached(t: torch.Tensor) -> torch.Tensor:
        t = blocked(t, before, after)
        t = torch.cat([t[:, shift : shift + blocks] for shift in range(before + 1 + after)], dim=2)
        return t.flatten(0, 1).transpose(1, 2)

    mask = packed.cached(("bands", window, causal), lambda: band_mask(packed, window, causal, before, after))
    queries = blocked(q, 0, 0).flatten(0, 1).transpose(1, 2)
    out = functional.scaled_dot_product_attention(queries, reached(k), reached(v), attn_mask=mask)
    attended: torch.Tensor = out.transpose(1, 2).unflatten(0, (rows, blocks)).flatten(1, 2)[:, : packed.seq_len]
    return attended.flatten(0, 1)


def band_mask(packed: PackedRows, window: int, causal: bool, before: int, after: int) -> torch.Tensor:
    """Return the mask [rows * blocks, 1, BAND, reach * BAND] of `attend_bands`.

    Queries past the row's end see the padding around them, so that no softmax is empty.
    """
    rows, length = packed.rows, packed.seq_len
    blocks, reach = -(-length // BAND), before + 1 + after
    device = packed.segments.device
    padded = torch.full((rows, (blocks + before + after) * BAND), -1, device=device)
    padded[:, before * BAND : before * BAND + length] = packed.segments.view(rows, length)
    query_segments = padded[:, before * BAND : (before + blocks) * BAND].reshape(rows, blocks, BAND)
    # [rows, blocks, reach * BAND]
    key_segments = padded.unfold(1, reach * BAND, BAND)
    query_offset = torch.arange(BAND, device=device) + before * BAND
    near = allowed(query_offset[:, None], torch.arange(reach * BAND, device=device)[None], window, causal)
    same = query_segments[..., :, None] == key_segments[..., None, :]
    return (same & near).flatten(0, 1)[:, None]


def attend_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend by torch's own flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window_sides(window, causal))
    # it is a tuple only if auxiliary outputs are requested
    assert isinstance(out, torch.Tensor)
    return out


def attend_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Attend by the flash-attn package: version 3 (for Hopper) if it is installed, else 2."""
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


def rotary_tables(packed: PackedRows, dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the micro-batch's positions, each [tokens, 1, dim]; angles are computed in fp32."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        channels = torch.arange(0, dim, 2, dtype=torch.float32, device=packed.positions.device)
        angles = packed.positions[:, None].float() * theta ** (-channels / dim)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    return packed.cached(("rotary", dim, theta, dtype), make)


@maybe_compile
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [tokens, heads, dim] by the tables."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def to_heads(tensors: tuple[torch.Tensor, ...], rows: int, group: Any) -> tuple[torch.Tensor, ...]:
    """Exchange each [rows * seq_len / cp, heads, dim] for [rows * seq_len, heads / cp, dim] (collective)."""
    # [local tokens, n, heads, dim]
    cp, x = group.size(), torch.stack(tensors, dim=1)
    # [rows, slice, n, cp, heads / cp, dim]
    x = x.unflatten(2, (cp, -1)).unflatten(0, (rows, -1))
    # after the exchange the first dimension counts slices
    exchanged: torch.Tensor = all_to_all(group, x.permute(3, 0, 1, 2, 4, 5))
    return exchanged.transpose(0, 1).flatten(0, 2).unbind(1)


def to_tokens(x: torch.Tensor, rows: int, group: Any) -> torch.Tensor:
    """Exchange [rows * seq_len, heads / cp, dim] for [rows * seq_len / cp, heads, dim] (collective)."""
    # [cp, rows, slice, heads / cp, dim]
    x = x.unflatten(0, (rows, group.size(), -1)).transpose(0, 1)
    # after the exchange the first dimension counts groups of heads
    exchanged: torch.Tensor = all_to_all(group, x)
    return exchanged.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
