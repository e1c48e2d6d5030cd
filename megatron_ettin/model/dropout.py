"""Apply dropout by masks that are hashes of counters, and add the residual.

A mask depends on (seed, phase, step, layer, row slot, token, channel) alone.
A generator's history would tie the mask to the layout; a counter does not. The mask is the same on every TP x PP x DP
split, for every micro-batch size, after every resume and under recomputation. Two channels share one 32-bit hash, 16
bits each: the drop probability is p rounded to 1/65536, and kept values are scaled by exactly the kept share.
The hash is `lowbias32` (Chris Wellons' two-round multiply-xorshift) of one key per token and one counter per 32-bit
word, in 32-bit operations that a GPU kernel can do as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import compile_enabled, maybe_compile

# odd constants that spread consecutive counters
_TOKEN, _WORD = 0x9E3779B1, 0x85EBCA77


def _signed(value: int) -> int:
    """Return the int32 with the bits of an unsigned 32-bit constant."""
    return value - (1 << 32) if value >= 1 << 31 else value


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Apply lowbias32 to int32 `x` in place; masking off the copied sign makes its shifts logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def step_key(seed: int, phase: str, step: int) -> int:
    """Return the 64-bit key of a step's masks."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{phase}:{step}".encode()).digest()[:8], "little")


def _layer_key(dropout_key: int, layer: int) -> tuple[int, int]:
    """Return a layer's two signed 32-bit keys at a step: for row slots and for tokens."""
    digest = hashlib.sha256(f"{dropout_key}:{layer}".encode()).digest()
    slot_key, token_key = (_signed(int.from_bytes(digest[i : i + 4], "little")) for i in (0, 4))
    return slot_key, token_key


def layer_keys(dropout_key: int, layers: int) -> torch.Tensor:
    """Return the keys of layers 0 to `layers`, int32 [layers + 1, 2] on the host. Layers count from 1; 0 is unused."""
    return torch.tensor([_layer_key(dropout_key, layer) for layer in range(layers + 1)], dtype=torch.int32)


def token_keys(packed: PackedRows, layer: int, first: int, tokens: int) -> torch.Tensor:
    """Return int32 keys [tokens] of the tokens from `first` on in this rank's part of the micro-batch."""
    device = packed.slots.device
    slot_key: Any
    token_key: Any
    slot_key, token_key = _layer_key(packed.dropout_key, layer)
    if packed.layer_keys is not None:
        slot_key, token_key = packed.layer_keys[layer].unbind()
    flat = torch.arange(first, first + tokens, device=device)
    if packed.flat:
        flat += packed.slice_start
        slots, positions = packed.slots[packed.segments[flat]], packed.positions[flat]
    else:
        slots, positions = packed.slots[flat // packed.slice_tokens], packed.slice_start + flat % packed.slice_tokens
    slots, positions = slots.to(torch.int32), positions.to(torch.int32)
    return mix32(mix32(slots * _signed(_TOKEN) + slot_key) ^ (positions * _signed(_TOKEN) + token_key))


def keep_mask(keys: torch.Tensor, channels: int, dropped: int) -> torch.Tensor:
    """Return which channels are kept, bool [tokens, channels]; `dropped`: drop probability x 65536."""
    counters = torch.arange((channels + 1) // 2, device=keys.device, dtype=torch.int32) * _signed(_WORD)
    bits = mix32(keys[:, None] ^ counters[None])
    return (bits.view(torch.int16) >= dropped - 32768)[:, :channels]


def keep_mask_by_channel(keys: torch.Tensor, channels: int, dropped: int) -> torch.Tensor:
    """Return the mask of `keep_mask` by one hash per channel: twice the work, but it compiles to one kernel."""
    channel = torch.arange(channels, device=keys.device, dtype=torch.int32)
    bits = mix32(keys[:, None] ^ ((channel >> 1) * _signed(_WORD))[None])
    half = (bits >> ((channel & 1) * 16)[None]) & 0xFFFF
    # flipping the highest bit gives unsigned numbers the order of int16, which `keep_mask` compares
    return (half ^ 0x8000) >= dropped


@maybe_compile
def add_kept(x: torch.Tensor, residual: torch.Tensor, keys: torch.Tensor, dropped: int, scale: float) -> torch.Tensor:
    """Return residual + x * mask * scale; tensors [tokens, 1, channels]."""
    keep = keep_mask_by_channel(keys, x.shape[-1], dropped)[:, None]
    return torch.where(keep, residual + x * scale, residual)


@maybe_compile
def kept_gradient(gradient: torch.Tensor, keys: torch.Tensor, dropped: int, scale: float) -> torch.Tensor:
    """Return the gradient of `add_kept` with respect to x."""
    return torch.where(keep_mask_by_channel(keys, gradient.shape[-1], dropped)[:, None], gradient * scale, 0.0)


class _DropoutAdd(torch.autograd.Function):
    """Compute residual + x * mask * scale.

    Compiled, it saves the tokens' keys and hashes again in backward; else it saves the mask, one byte per element.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, keys: torch.Tensor, dropped: int) -> torch.Tensor:
        ctx.dropped, ctx.scale, ctx.compiled = dropped, 65536 / (65536 - dropped), compile_enabled()
        if ctx.compiled:
            ctx.save_for_backward(keys)
            added: torch.Tensor = add_kept(x, residual, keys, dropped, ctx.scale)
            return added
        keep = keep_mask(keys, x.shape[-1], dropped)[:, None]
        ctx.save_for_backward(keep)
        return torch.addcmul(residual, x, keep.to(x.dtype), value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (saved,), gradient = ctx.saved_tensors, gradients[0]
        if ctx.compiled:
            return kept_gradient(gradient, saved, ctx.dropped, ctx.scale), gradient, None, None
        return gradient * saved.to(gradient.dtype) * ctx.scale, gradient, None, None


class CounterDropoutAdd(torch.nn.Module):
    """Dropout and residual sum in core's `self_attn_bda` (bias, dropout, add) role.

    Core builds it without arguments: its layer sets `config` and `layer_number` once, and `packed` before each call.
    """

    config: Any = None
    layer_number = 0
    packed: PackedRows | None = None
    slice_rank = 0
    """Index of this rank's slice of the tokens; not 0 under sequence parallelism."""

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return the function that core calls with (x, bias) and the residual, both [tokens, 1, hidden]."""
        probability = self.config.attention_output_dropout

        def add(x_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, _: float) -> torch.Tensor:
            # [tokens, 1, hidden]
            x = x_with_bias[0]
            if not training or probability == 0:
                return residual + x
            assert self.packed is not None
            tokens = x.shape[0]
            keys = token_keys(self.packed, self.layer_number, self.slice_rank * tokens, tokens)
            apply: Callable[..., torch.Tensor] = _DropoutAdd.apply
            return apply(x, residual, keys, round(probability * 65536))

        return add


class PlainAdd(torch.nn.Module):
    """Residual sum in core's `mlp_bda` role."""

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return the function that core calls with (x, bias) and the residual."""
        return lambda x_with_bias, residual, _: residual + x_with_bias[0]
