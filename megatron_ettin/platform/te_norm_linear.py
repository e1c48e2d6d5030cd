"""Transformer Engine's fused LayerNorm + column-parallel linear without the norm's bias.

TE's LayerNorm always owns a bias; the recipe's norms have none. It is kept at zero, given no gradient and left out of
checkpoints, and TE's pickled `_extra_state` with it, so that the canonical names equal those of the local layers."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear


class BiasFreeNormColumnLinear(TELayerNormColumnParallelLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_norm_bias.data.zero_()
        self.layer_norm_bias.requires_grad_(False)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Core's, without the norm's bias."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("layer_norm_bias")}
