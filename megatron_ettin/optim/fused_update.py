"""StableAdamW's update in two kernels a tensor. It costs the memory it goes through: here 36 bytes a weight (gradient,
moments read and written; then moments, weight read and written), as single operations three times that. Whatever
differs between steps comes as a tensor on the device: nothing is compiled anew, and the host never waits to learn a
clip. Both are adamw.py's formulas; all tensors are flat and fp32."""

from __future__ import annotations

import torch

from megatron_ettin.platform.compile import fusible_at_any_size


@fusible_at_any_size
def update_moments(
    gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, b1: torch.Tensor, b2: torch.Tensor, floor: float
) -> torch.Tensor:
    """Both moments in place, `b1` and `b2` being those of the step; returns the sum of g^2 / max(v, floor)."""
    squared = gradient * gradient
    m.add_((gradient - m) * b1)
    v.mul_(b2).add_(squared * (1 - b2))
    return (squared / v.clamp(min=floor)).sum()


@fusible_at_any_size
def update_weights(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, lr: torch.Tensor, kept: torch.Tensor, eps: float
) -> None:
    """`p` in place at the clipped learning rate `lr`; `kept`: what the decay leaves of a weight."""
    p.mul_(kept).sub_(lr * m / (v.sqrt() + eps))
