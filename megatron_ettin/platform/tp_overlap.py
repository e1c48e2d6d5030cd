"""Transformer Engine's overlap of tensor parallelism's gathers and scatters with the products they belong to
("userbuffers"): buffers of one shape, made before the model and given back after it."""

from __future__ import annotations


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
