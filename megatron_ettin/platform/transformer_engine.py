"""Transformer Engine's fused LayerNorm + column-parallel linear without the norm's bias.

TE's LayerNorm always owns a bias; the recipe's norms have none. Here it is a constant of zeros, no parameter: nothing
trains it, counts it, reduces it (DeepSpeed would) or writes it, and names in checkpoints equal the local layers'.

Transformer Engine's overlap of tensor parallelism's gathers and scatters with the products they belong to
("userbuffers"): buffers of one shape, made before the model and given back after it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear


class BiasFreeNormColumnLinear(TELayerNormColumnParallelLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias = self.layer_norm_bias
        del self.layer_norm_bias
        self.register_buffer("layer_norm_bias", torch.zeros_like(bias.data), persistent=False)


def make_buffers(tokens: int, hidden_size: int, tp: int, fp8: bool, bf16: bool) -> None:
    """Buffers for micro-batches of `tokens` tokens over all tensor-parallel ranks; `fp8`, `bf16`: whether there are
    layers of that kind, each of which has buffers of its own. Collective."""
    from transformer_engine.pytorch.module import base

    kinds = base.UserBufferQuantizationMode
    modes = [mode for mode, wanted in ((kinds.FP8, fp8), (kinds.NONE, bf16)) if wanted]
    base.initialize_ub([tokens, hidden_size], tp, quantization_modes=modes, bootstrap_backend="nccl")


def free_buffers() -> None:
    from transformer_engine.pytorch.module import base

    base.destroy_ub()
