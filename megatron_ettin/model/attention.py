"""Core attention of packed rows with torch's scaled_dot_product_attention: rotary embedding, chunk boundaries, window.

Every layer gives exactly the masked softmax of RECIPE section 2; three ways of computing it differ in cost only:
`dense` masks whole rows (short rows), `chunks` runs one unmasked attention a chunk (no work across boundaries),
`bands` cuts rows into blocks that see only the blocks a window can reach (no work outside the window).
`TransformerEngineAttention` is the GPU's: the same rotation, then TE's kernel with cu_seqlens and the window.
Under context parallelism both attend to whole rows of some of the heads (ulysses.py).

Rotary position embedding (RoPE), non-interleaved, over the whole head, positions restarting at every chunk.

Source: Su et al. 2021 (arXiv 2104.09864), in the half-split form of GPT-NeoX and ModernBERT: channel c pairs with
c + dim/2 and turns by position * theta^(-2c/dim). Local and global layers have thetas of their own.

Context parallelism: between layers a rank holds a slice of every row, inside attention whole rows of fewer heads.

DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all before the core attention trades tokens for heads, one after it
trades them back. What attends in between is the ordinary packed attention, with any window and any boundaries, and it
is the same on every device. The price is that tp x cp must divide the heads."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import maybe_compile

BAND = 64  # tokens a block of `bands`; the window is rounded up to blocks
DENSE_ROW_TOKENS = 192  # up to here a masked row costs less than many small calls
MASKS = {True: AttnMaskType.padding_causal, False: AttnMaskType.padding}


class _RotaryAttention(MegatronModule):
    """What both kernels share: which theta and windows a layer has. `layer_number` counts from 1, as core does.
    A micro-batch's causal rows come first; where it has others too, each part is attended to by itself."""

    def __init__(self, config: Any, layer_number: int, pg_collection: Any = None) -> None:
        super().__init__(config=config)
        self.context_group = None if pg_collection is None or pg_collection.cp.size() == 1 else pg_collection.cp
        self.is_global = (layer_number - 1) % config.global_attention_every == 0
        self.theta = config.global_rope_theta if self.is_global else config.local_rope_theta
        # of causal rows (True) and of others
        self.windows = dict.fromkeys((True, False)) if self.is_global else config.attention_windows
        self.causal = config.causal

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
        *, packed_seq_params: PackedRows, **arguments: Any,
    ) -> torch.Tensor:  # fmt: skip
        """query, key, value [tokens, heads, dim] -> [tokens, heads * dim] of this rank's slices of the rows."""
        packed, group = packed_seq_params, self.context_group
        if group is not None:
            query, key, value = to_heads((query, key, value), packed.rows, group)
        cos, sin = rotary_tables(packed, query.shape[-1], self.theta, query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        outs, begin = [], 0
        for part, causal in packed.parts(self.causal):
            end = begin + part.rows * part.seq_len
            one = self.attend(query[begin:end], key[begin:end], value[begin:end], part, causal, arguments)
            outs.append(one.view_as(query[begin:end]))
            begin = end
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return (out if group is None else to_tokens(out, packed.rows, group)).flatten(1)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: PackedRows, causal: bool, arguments: dict
    ) -> torch.Tensor:
        """Rows of one kind, [tokens, heads, dim] of each. `arguments`: core's others."""
        raise NotImplementedError


class KernelAttention(_RotaryAttention):
    """Attention by a function that takes boundaries and window: `attend` here, or one of attention_kernels.py."""

    def __init__(self, config: Any, layer_number: int, kernel: Any = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config, layer_number, pg_collection)
        self.kernel = kernel or attend

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: PackedRows, causal: bool, arguments: dict
    ) -> torch.Tensor:
        return self.kernel(q, k, v, part, self.windows[causal], causal)


class TransformerEngineAttention(_RotaryAttention):
    """Rotation, then TE's fused or flash kernel on [tokens, heads, dim] with cu_seqlens and the layer's window."""

    def __init__(self, config: Any, layer_number: int, kernel: Any, **arguments: Any) -> None:
        super().__init__(config, layer_number, arguments.get("pg_collection"))
        # a kernel of TE has its window from the start: a hybrid model wants two; they hold no weights
        self.kernels = torch.nn.ModuleDict()
        for causal in {True, False} if config.hybrid else {self.causal}:
            layer_config = copy.copy(config)  # core's class reads the window from its configuration
            layer_config.window_size, layer_config.window_attn_skip_freq = self._te_window(causal), None
            if self.context_group is not None:  # heads that reach the kernel
                layer_config.num_attention_heads //= self.context_group.size()
                layer_config.num_query_groups = layer_config.num_attention_heads
            mask = {"attn_mask_type": MASKS[causal]}
            self.kernels[str(causal)] = kernel(config=layer_config, layer_number=layer_number, **arguments | mask)

    def _te_window(self, causal: bool) -> tuple[int, int] | None:
        """TE counts keys to the left and to the right, both inclusive."""
        window = self.windows[causal]
        if window is None:
            return None
        return (window - 1, 0) if causal else (window, window)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: PackedRows, causal: bool, arguments: dict
    ) -> torch.Tensor:
        named = {**arguments, "attn_mask_type": MASKS[causal], "packed_seq_params": part}
        return self.kernels[str(causal)](q, k, v, None, **named)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """The cheapest way for rows of this length and this window."""
    longest = packed.max_seqlen_q or packed.seq_len
    if packed.seq_len <= DENSE_ROW_TOKENS:
        return attend_dense(q, k, v, packed, window, causal)
    if window is None or longest <= window:
        return attend_chunks(q, k, v, packed, causal)
    return attend_bands(q, k, v, packed, window, causal)


def allowed(query: torch.Tensor, key: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
    """Whether query position may see key position, by causality and window alone."""
    distance = query - key
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & ((distance < window) if causal else (distance.abs() <= window))
    return mask


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int | None, causal: bool
) -> torch.Tensor:
    """Whole rows under a [rows, 1, seq_len, seq_len] mask."""

    def make() -> torch.Tensor:
        segments = packed.segments.view(-1, packed.seq_len)
        place = torch.arange(packed.seq_len, device=segments.device)
        near = allowed(place[:, None], place[None], window, causal)
        return ((segments[:, :, None] == segments[:, None, :]) & near)[:, None]

    mask = packed.once(("dense", window, causal), make)
    q, k, v = (t.unflatten(0, (-1, packed.seq_len)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)


def attend_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, causal: bool) -> torch.Tensor:
    """One attention a chunk: nothing is computed across boundaries, no mask exists."""
    outs = []
    for chunk in zip(*(t.split(packed.chunk_lengths) for t in (q, k, v)), strict=True):
        query, key, value = (t.transpose(0, 1)[None] for t in chunk)
        outs.append(F.scaled_dot_product_attention(query, key, value, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(outs)


def attend_bands(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedRows, window: int, causal: bool
) -> torch.Tensor:
    """Blocks of BAND queries against the blocks their window reaches: [rows * blocks, heads, BAND, reach * BAND]."""
    before = -(-(window - 1 if causal else window) // BAND)
    after = 0 if causal else before
    rows, blocks = packed.rows, -(-packed.seq_len // BAND)
    padding = blocks * BAND - packed.seq_len

    def blocked(
        t: torch.Tensor, left: int, right: int
    ) -> torch.Tensor:  # [tokens, h, d] -> [rows, left+blocks+right, BAND, h, d]
        t = t.unflatten(0, (rows, packed.seq_len))
        t = F.pad(t, (0, 0, 0, 0, left * BAND, padding + right * BAND))
        return t.unflatten(1, (-1, BAND))

    def reached(t: torch.Tensor) -> torch.Tensor:  # -> [rows * blocks, h, reach * BAND, d]
        t = blocked(t, before, after)
        t = torch.cat([t[:, shift : shift + blocks] for shift in range(before + 1 + after)], dim=2)
        return t.flatten(0, 1).transpose(1, 2)

    mask = packed.once(("bands", window, causal), lambda: band_mask(packed, window, causal, before, after))
    queries = blocked(q, 0, 0).flatten(0, 1).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, reached(k), reached(v), attn_mask=mask)
    return out.transpose(1, 2).unflatten(0, (rows, blocks)).flatten(1, 2)[:, : packed.seq_len].flatten(0, 1)


def band_mask(packed: PackedRows, window: int, causal: bool, before: int, after: int) -> torch.Tensor:
    """[rows * blocks, 1, BAND, reach * BAND] of what `attend_bands` may see. Queries past the row's end see the
    padding beside them, so that no softmax is empty."""
    rows, length = packed.rows, packed.seq_len
    blocks, reach = -(-length // BAND), before + 1 + after
    device = packed.segments.device
    padded = torch.full((rows, (blocks + before + after) * BAND), -1, device=device)
    padded[:, before * BAND : before * BAND + length] = packed.segments.view(rows, length)
    query_segments = padded[:, before * BAND : (before + blocks) * BAND].reshape(rows, blocks, BAND)
    key_segments = padded.unfold(1, reach * BAND, BAND)  # [rows, blocks, reach * BAND]
    query_place = torch.arange(BAND, device=device) + before * BAND
    near = allowed(query_place[:, None], torch.arange(reach * BAND, device=device)[None], window, causal)
    same = query_segments[..., :, None] == key_segments[..., None, :]
    return (same & near).flatten(0, 1)[:, None]


def rotary_tables(packed: PackedRows, dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the micro-batch's positions, each [tokens, 1, dim]. Angles are computed in fp32."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        channels = torch.arange(0, dim, 2, dtype=torch.float32, device=packed.positions.device)
        angles = packed.positions[:, None].float() * theta ** (-channels / dim)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    return packed.once(("rotary", dim, theta, dtype), make)


@maybe_compile
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, dim] turned by the tables."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Exchange(torch.autograd.Function):
    """all-to-all over the first dimension: block i goes to rank i. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None


def to_heads(tensors: tuple[torch.Tensor, ...], rows: int, group: Any) -> tuple[torch.Tensor, ...]:
    """Each [rows * seq_len / cp, heads, dim] -> [rows * seq_len, heads / cp, dim], in one exchange. Collective."""
    cp, x = group.size(), torch.stack(tensors, dim=1)  # [local tokens, n, heads, dim]
    x = x.unflatten(2, (cp, -1)).unflatten(0, (rows, -1))  # [rows, slice, n, cp, heads / cp, dim]
    x = _Exchange.apply(x.permute(3, 0, 1, 2, 4, 5), group)  # the first dimension now counts slices
    return x.transpose(0, 1).flatten(0, 2).unbind(1)


def to_tokens(x: torch.Tensor, rows: int, group: Any) -> torch.Tensor:
    """The way back: [rows * seq_len, heads / cp, dim] -> [rows * seq_len / cp, heads, dim]. Collective."""
    x = x.unflatten(0, (rows, group.size(), -1)).transpose(0, 1)  # [cp, rows, slice, heads / cp, dim]
    x = _Exchange.apply(x, group)  # the first dimension now counts groups of heads
    return x.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
