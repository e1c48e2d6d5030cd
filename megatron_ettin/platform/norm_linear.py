"""Remove the norm's bias from Transformer Engine's fused LayerNorm + column-parallel linear.

TE's LayerNorm always has a bias; the recipe's norms have none. Here it is a constant of zeros instead of a parameter:
nothing trains, counts, reduces (DeepSpeed would) or saves it, and names in checkpoints equal the local layers'.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear


class BiasFreeNormColumnLinear(TELayerNormColumnParallelLinear):
    """Norm and column-parallel linear, with a buffer of zeros in place of the norm's bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias = self.layer_norm_bias
        del self.layer_norm_bias
        self.register_buffer("layer_norm_bias", torch.zeros_like(bias.data), persistent=False)
