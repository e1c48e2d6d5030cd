"""Matrix products with 16-bit, fp32 or FP8 operands."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulated_te.fp8_types import torch_dtype
from tests.emulated_te.quantize import quantize, values_of

KERNELS = ["generic_gemm"]


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    is_gradient: bool,
    workspace: torch.Tensor,
    workspace_bytes: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, torch.Tensor | None, None, None]:
    """Compute op(b) op(a), summed in fp32 and rounded once: cuBLAS is column-major, so the result has the second operand's
    rows. Return (result, gradient of the bias, None, None)."""
    if gelu or comm_overlap is not None or extra_output is not None:
        raise NotImplementedError("a product with an activation or with communication is not emulated")
    left = values_of(b, rowwise=not transpose_b)
    right = values_of(a, rowwise=transpose_a)
    product = alpha * ((left.T if transpose_b else left) @ (right.T if transpose_a else right))
    if bias is not None and not is_gradient:
        product = product + bias.float()
    shape = product.shape if transpose_b else (*b.size()[:-1], product.shape[-1])
    bias_gradient = left.sum(0).to(bias.dtype) if bias is not None and is_gradient else None
    if out is not None:
        assert out.numel() == product.numel(), f"a result of {tuple(product.shape)} into {tuple(out.shape)}"
        product = product.view_as(out)
        out.copy_(out.float() * (1.0 if beta is None else beta) + product if accumulate else product)
    else:
        dtype = torch_dtype(out_dtype) if out_dtype is not None else torch.bfloat16
        out = product.view(shape).to(dtype)
    return (quantize(out, quantizer) if quantizer is not None else out), bias_gradient, None, None
