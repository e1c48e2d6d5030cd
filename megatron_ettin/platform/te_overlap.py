"""Transformer Engine's overlap of tensor parallelism's gathers and scatters with the products they belong to
("userbuffers"): buffers of one shape, made before the model and given back after it."""

from __future__ import annotations


def make_buffers(tokens: int, hidden_size: int, tp: int, fp8: bool) -> None:
    """Buffers for micro-batches of `tokens` tokens over all tensor-parallel ranks. Collective."""
    from transformer_engine.pytorch.module import base

    mode = base.UserBufferQuantizationMode.FP8 if fp8 else base.UserBufferQuantizationMode.NONE
    base.initialize_ub([tokens, hidden_size], tp, quantization_modes=[mode], bootstrap_backend="nccl")


def free_buffers() -> None:
    from transformer_engine.pytorch.module import base

    base.destroy_ub()
