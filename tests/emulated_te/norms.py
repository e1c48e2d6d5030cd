"""LayerNorm with its statistics, forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulated_te.fp8_types import torch_dtype
from tests.emulated_te.quantize import quantize

KERNELS = ["layernorm_fwd", "layernorm_bwd"]


def layernorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Normalize [tokens, width]; return (normalized, mean [tokens], 1 / deviation [tokens])."""
    values = x.float()
    mean = values.mean(-1)
    inverse = torch.rsqrt((values - mean[:, None]).square().mean(-1) + eps)
    normal = (values - mean[:, None]) * inverse[:, None] * (weight.float() + float(zero_centered_gamma))
    normal = (normal if bias is None else normal + bias.float()).to(torch_dtype(out_dtype))
    if quantizer is not None:
        return quantize(normal, quantizer, out), mean, inverse
    return (normal if out is None else out.copy_(normal)), mean, inverse


def layernorm_bwd(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the input, the weight and the bias."""
    normal = (x.float() - mean[:, None]) * inverse[:, None]
    arriving = gradient.float()
    scaled = arriving * (weight.float() + float(zero_centered_gamma))
    inner = scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)
    of_weight, of_bias = (arriving * normal).sum(0), arriving.sum(0)
    return (inner * inverse[:, None]).to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)
