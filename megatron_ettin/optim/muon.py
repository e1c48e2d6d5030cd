"""Implement Muon for the hidden matrices, and StableAdamW for the rest: embedding, vocabulary bias, norms.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. For a matrix with momentum beta and gradient g:
    m += (1 - beta)(g - m);  u = g + beta (m - g)                                            (Nesterov)
    p *= 1 - lr/max_lr * weight_decay;  p -= lr * adjust(shape) * orthogonal(u)
`orthogonal` is torch.optim.Muon's Newton-Schulz iteration (five steps in bfloat16) and `adjust` its adjust_lr_fn. It
needs whole matrices: momentum is sharded, u is gathered over tensor parallelism, and each rank keeps its own rows or
columns. Fused weights are orthogonalized as the matrices they consist of: q, k, v; the gated MLP's two halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ettin.optim.adamw import ParamInfo, StableAdamW

QKV, GATED = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
# their rows are looked up one by one, not multiplied as a matrix
EMBEDDINGS = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Matrix(ParamInfo):
    """Description of a parameter that Muon updates as one or several matrices."""

    name: str
    head_channels: int
    partition_dim: int | None
    """Dimension that tensor parallelism splits; None: every rank holds the whole tensor."""

    def split(self, shard: torch.Tensor) -> list[torch.Tensor]:
        """Return the shard of each matrix. q, k and v are stored as rows [head][q, k, v][channel]."""
        if self.name.endswith(QKV):
            return [part.flatten(0, 1) for part in shard.unflatten(0, (-1, 3, self.head_channels)).unbind(1)]
        return list(shard.chunk(2)) if self.name.endswith(GATED) else [shard]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the shard of the parameter from those of its matrices; the inverse of `split`."""
        if self.name.endswith(QKV):
            heads = [part.unflatten(0, (-1, self.head_channels)) for part in parts]
            return torch.stack(heads, dim=1).flatten(0, 2)
        return torch.cat(parts)


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Return whether Muon updates this parameter."""
    return parameter.ndim == 2 and not name.endswith(EMBEDDINGS)


class Muon(StableAdamW):
    """Muon, as in the module docstring. Its groups have `momentum` and `adjust_lr`; a `Matrix` describes a matrix."""

    def _new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._matrix(p) is not None:
            return {"momentum_buffer": torch.zeros_like(p.data)}
        return super()._new_state(p)

    def _with_gradients(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Return the parameters that StableAdamW updates."""
        return [(group, p) for group, p in super()._with_gradients() if self._matrix(p) is None]

    def _matrix(self, p: torch.Tensor) -> Matrix | None:
        param = self.slices[p][0].param
        return param if isinstance(param, Matrix) else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update this rank's shards (collective over `sum_group`)."""
        super().step()
        for group, p in super()._with_gradients():
            matrix = self._matrix(p)
            if matrix is not None and p.grad is not None:
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                self._decay(p, group, group["lr"])
                update = self._orthogonal(p.grad.lerp(momentum, group["momentum"]), matrix, group["adjust_lr"])
                p.add_(update, alpha=group["lr"])

    def _orthogonal(self, shard: torch.Tensor, matrix: Matrix, adjust_lr: str) -> torch.Tensor:
        """Return this rank's shard of the update at a learning rate of 1 (collective)."""
        rank, dim, group = 0, matrix.partition_dim, self.sum_group
        shards = [shard]
        if dim is not None and group is not None:
            rank, shards = group.rank(), [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(shards, shard.contiguous(), group=group)
        parts = zip(*(matrix.split(one) for one in shards), strict=True)
        updates = orthogonal_updates([torch.cat(part, dim or 0) for part in parts], adjust_lr)
        return matrix.join([update.chunk(len(shards), dim or 0)[rank] for update in updates])


def orthogonal_updates(matrices: list[torch.Tensor], adjust_lr: str) -> list[torch.Tensor]:
    """Return what torch.optim.Muon adds to each weight at a learning rate of 1, given gradients with momentum."""
    updates = [torch.nn.Parameter(torch.zeros_like(matrix)) for matrix in matrices]
    for update, matrix in zip(updates, matrices, strict=True):
        update.grad = matrix
    torch.optim.Muon(
        updates, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn=adjust_lr
    ).step()  # fmt: skip
    return [update.data for update in updates]
