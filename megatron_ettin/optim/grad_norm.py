"""The global gradient norm and clipping by it, left on the device. Core's own reads the norm back between gradients and
update: the device would stand idle until the update's kernels arrive."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def global_norm(core: Any, device: torch.device) -> torch.Tensor:
    """The norm of all gradients, each counted once, fp32 scalar. `core`: one of core's optimizers, whose main gradients
    are ready. Collective."""
    gradients = core.get_main_grads_for_grad_norm() if core.get_parameters() else []
    norm = torch.nn.utils.get_total_norm(gradients).to(device=device, dtype=torch.float32)
    group = core.get_grad_stats_parallel_group()
    if group.size() > 1:
        norm.square_()
        dist.all_reduce(norm, group=group)
        norm.sqrt_()
    return norm


def clip(core: Any, most: float, norm: torch.Tensor) -> None:
    """Scale all gradients so that their norm is `most` where it is more."""
    torch.nn.utils.clip_grads_with_norm_(core.get_parameters(), most, norm)
