"""LayerNorm without bias. Core's own local norm refuses sequence parallelism; this one marks its weight, and core sums
the gradient over tensor-parallel ranks (each holds a slice of the tokens)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class BiasFreeLayerNorm(torch.nn.Module):
    """(x - mean) / sqrt(var + eps) * weight over the last dimension."""

    def __init__(
        self, config: Any, hidden_size: int, eps: float = 1e-5, sequence_parallel: bool | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        shards = config.sequence_parallel if sequence_parallel is None else sequence_parallel
        setattr(self.weight, "sequence_parallel", shards)  # noqa: B010  an attribute core looks for
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)
