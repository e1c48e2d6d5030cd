"""The gated MLP: core's two linears and, between them, the gate as one function that may be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP

from megatron_ettin.platform.compile import fusible


@fusible
def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU (exact, not its tanh form) of the first half of the channels times the second."""
    first, second = x.chunk(2, dim=-1)
    return F.gelu(first) * second


class GatedMlp(MLP):
    """Core's MLP without its choices: gate, exact GELU, no biases."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[tokens, 1, hidden] -> the same shape, and core's bias, which there is none of."""
        inner, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(gated_gelu(inner))
