"""Make and free the buffers ("userbuffers") of Transformer Engine's communication overlap.

With them the communication of tensor parallelism runs concurrently with matrix products. They have one shape, are made
before the model and freed after it.
"""

from __future__ import annotations


def make_buffers(tokens: int, hidden_size: int, tp: int, fp8: bool, bf16: bool) -> None:
    """Make the buffers for micro-batches of `tokens` tokens over all tensor-parallel ranks (collective).

    `fp8` and `bf16` say whether there are layers of that precision, each of which has its own buffers.
    """
    from transformer_engine.pytorch.module import base

    mode = base.UserBufferQuantizationMode
    modes = [one for one, wanted in ((mode.FP8, fp8), (mode.NONE, bf16)) if wanted]
    base.initialize_ub([tokens, hidden_size], tp, quantization_modes=modes, bootstrap_backend="nccl")


def free_buffers() -> None:
    """Free the buffers of `make_buffers`."""
    from transformer_engine.pytorch.module import base

    base.destroy_ub()
