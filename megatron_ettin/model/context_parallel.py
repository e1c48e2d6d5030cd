"""Context parallelism: between layers a rank holds a slice of every row, inside attention whole rows of fewer heads.

DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all before the core attention trades tokens for heads, one after it
trades them back. What attends in between is the ordinary packed attention, with any window and any boundaries, and it
is the same on every device. The price is that tp x cp must divide the heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


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
