"""torch's dtypes for Transformer Engine's types."""

from __future__ import annotations

from typing import Any

import torch


def torch_dtype(dtype: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[dtype]


def largest(dtype: Any) -> float:
    return torch.finfo(torch_dtype(dtype)).max


def as_bytes(values: torch.Tensor, dtype: Any) -> torch.Tensor:
    limit = largest(dtype)
    return values.clamp(-limit, limit).to(torch_dtype(dtype)).view(torch.uint8)
