"""Dropout whose mask is a pure function of (seed, step, layer, row slot, token, channel), added to the residual.

A generator's history would tie the mask to the layout; a counter does not: the same mask on every TP x PP x DP split,
every micro-batch size, after every resume and under recomputation. Two channels share one 32-bit hash word, 16 bits
each, so the drop probability is p rounded to 1/65536 and the kept values are scaled by exactly what is kept.
The hash is `lowbias32` (Chris Wellons' two-round multiply-xorshift) of a key for each token and a counter for each
word; 32-bit operations so that a GPU kernel can do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import compile_enabled, maybe_compile

_TOKEN, _WORD = 0x9E3779B1, 0x85EBCA77  # odd constants that spread consecutive counters


def _signed(value: int) -> int:
    """An unsigned 32-bit constant as the int32 that holds its bits."""
    return value - (1 << 32) if value >= 1 << 31 else value


def mix32(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 of int32 `x`, in place. Shifts are made logical by masking off the copied sign."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def step_key(seed: int, phase: str, step: int) -> int:
    """Key of a step's masks, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{phase}:{step}".encode()).digest()[:8], "little")


def _layer_key(dropout_key: int, layer: int) -> tuple[int, int]:
    """What a layer's masks begin with at a step, for slots and for tokens: signed 32-bit numbers."""
    digest = hashlib.sha256(f"{dropout_key}:{layer}".encode()).digest()
    slot_key, token_key = (_signed(int.from_bytes(digest[i : i + 4], "little")) for i in (0, 4))
    return slot_key, token_key


def layer_keys(dropout_key: int, layers: int) -> torch.Tensor:
    """The keys of layers 0 (which is none: they count from 1) to `layers`, int32 [layers + 1, 2], on the host."""
    return torch.tensor([_layer_key(dropout_key, layer) for layer in range(layers + 1)], dtype=torch.int32)


def token_keys(packed: PackedRows, layer: int, first: int, tokens: int) -> torch.Tensor:
    """Keys [tokens], int32, of tokens first .. first + tokens - 1 of what this rank holds of the micro-batch."""
    device = packed.slots.device
    slot_key: Any
    token_key: Any
    slot_key, token_key = _layer_key(packed.dropout_key, layer)
    if packed.layer_keys is not None:
        slot_key, token_key = packed.layer_keys[layer].unbind()
    flat = torch.arange(first, first + tokens, device=device)
    if packed.flat:
        flat += packed.first_place
        slots, places = packed.slots[packed.segments[flat]], packed.positions[flat]
    else:
        slots, places = packed.slots[flat // packed.slice_tokens], packed.first_place + flat % packed.slice_tokens
    slots, places = slots.to(torch.int32), places.to(torch.int32)
    return mix32(mix32(slots * _signed(_TOKEN) + slot_key) ^ (places * _signed(_TOKEN) + token_key))


def keep_mask(keys: torch.Tensor, channels: int, dropped: int) -> torch.Tensor:
    """Which channels stay: bool [tokens, channels], of 65536 words all but `dropped`."""
    words = torch.arange((channels + 1) // 2, device=keys.device, dtype=torch.int32) * _signed(_WORD)
    bits = mix32(keys[:, None] ^ words[None])
    return (bits.view(torch.int16) >= dropped - 32768)[:, :channels]


def keep_mask_by_channel(keys: torch.Tensor, channels: int, dropped: int) -> torch.Tensor:
    """The same mask, each channel by itself: twice the hashing and no tensor in between, for one fused kernel."""
    channel = torch.arange(channels, device=keys.device, dtype=torch.int32)
    bits = mix32(keys[:, None] ^ ((channel >> 1) * _signed(_WORD))[None])
    half = (bits >> ((channel & 1) * 16)[None]) & 0xFFFF
    return (half ^ 0x8000) >= dropped  # as an unsigned number: int16's order, moved up


@maybe_compile
def add_kept(x: torch.Tensor, residual: torch.Tensor, keys: torch.Tensor, dropped: int, scale: float) -> torch.Tensor:
    """residual + x * mask * scale; tensors [tokens, 1, channels]."""
    keep = keep_mask_by_channel(keys, x.shape[-1], dropped)[:, None]
    return torch.where(keep, residual + x * scale, residual)


@maybe_compile
def kept_gradient(gradient: torch.Tensor, keys: torch.Tensor, dropped: int, scale: float) -> torch.Tensor:
    """What reaches x of `add_kept`."""
    return torch.where(keep_mask_by_channel(keys, gradient.shape[-1], dropped)[:, None], gradient * scale, 0.0)


class _DropoutAdd(torch.autograd.Function):
    """residual + x * mask * scale. Unfused it saves the mask, one byte an element; fused it saves the tokens' keys and
    hashes again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, keys: torch.Tensor, dropped: int) -> torch.Tensor:
        ctx.dropped, ctx.scale, ctx.fused = dropped, 65536 / (65536 - dropped), compile_enabled()
        if ctx.fused:
            ctx.save_for_backward(keys)
            return add_kept(x, residual, keys, dropped, ctx.scale)
        keep = keep_mask(keys, x.shape[-1], dropped)[:, None]
        ctx.save_for_backward(keep)
        return torch.addcmul(residual, x, keep.to(x.dtype), value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (saved,), gradient = ctx.saved_tensors, gradients[0]
        if ctx.fused:
            return kept_gradient(gradient, saved, ctx.dropped, ctx.scale), gradient, None, None
        return gradient * saved.to(gradient.dtype) * ctx.scale, gradient, None, None


class CounterDropoutAdd(torch.nn.Module):
    """Core's `self_attn_bda` (bias, dropout, add) role. Core builds it without arguments, so the layer that owns it
    sets `config` and `layer_number` once and `packed` before every call."""

    config: Any = None
    layer_number = 0
    packed: PackedRows | None = None
    first_token: Callable[[int], int] = staticmethod(
        lambda tokens: 0
    )  # sequence parallel: where this rank's slice begins

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        probability = self.config.attention_output_dropout

        def add(x_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, _: float) -> torch.Tensor:
            x = x_with_bias[0]  # [tokens, 1, hidden]
            if not training or probability == 0:
                return residual + x
            assert self.packed is not None
            keys = token_keys(self.packed, self.layer_number, self.first_token(x.shape[0]), x.shape[0])
            return _DropoutAdd.apply(x, residual, keys, round(probability * 65536))

        return add


class PlainAdd(torch.nn.Module):
    """Core's `mlp_bda` role: the residual sum, nothing else."""

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        return lambda x_with_bias, residual, _: residual + x_with_bias[0]
