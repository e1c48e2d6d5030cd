"""Host to device without waiting for the device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. A copy from ordinary memory would wait for all kernels before it; one from page-locked
    memory is queued behind them, and torch's host allocator keeps the memory until it is done."""
    if torch.device(device).type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
