"""Rotary position embedding (RoPE), non-interleaved, over the whole head, positions restarting at every chunk.

Source: Su et al. 2021 (arXiv 2104.09864), in the half-split form of GPT-NeoX and ModernBERT: channel c pairs with
c + dim/2 and turns by position * theta^(-2c/dim). Local and global layers have thetas of their own."""

from __future__ import annotations

import torch

from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import fusible


def rotary_tables(packed: PackedRows, dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the micro-batch's positions, each [tokens, 1, dim]. Angles are computed in fp32."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        channels = torch.arange(0, dim, 2, dtype=torch.float32, device=packed.positions.device)
        angles = packed.positions[:, None].float() * theta ** (-channels / dim)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    return packed.once(("rotary", dim, theta, dtype), make)


@fusible
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, dim] turned by the tables."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
