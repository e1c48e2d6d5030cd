"""MXFP8 of Blackwell: 32 consecutive values of a row share a power of two, stored as a byte (E8M0). A second copy, for
products along columns, shares it over 32 values of a column. Both copies are stored in the matrix's order."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulated_te.fp8_types import as_bytes, largest, torch_dtype

GROUP, BIAS = 32, 127


def _exponents(amax: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Return the smallest power of two that brings a group's largest value into the type's range."""
    exponents = torch.ceil(torch.log2(amax / largest(dtype)))
    return exponents.nan_to_num(neginf=-BIAS).clamp(-BIAS, BIAS)


def quantize(source: torch.Tensor, quantizer: Any, output: Any) -> None:
    flat = source.reshape(-1, source.shape[-1])
    if output._rowwise_data is not None:
        exponents = _exponents(flat.unflatten(1, (-1, GROUP)).abs().amax(2), quantizer.dtype)
        data = as_bytes(flat * torch.exp2(-exponents).repeat_interleave(GROUP, 1), quantizer.dtype)
        output._rowwise_data.copy_(data.view_as(output._rowwise_data))
        _put(output._rowwise_scale_inv, exponents)
    if output._columnwise_data is not None:
        exponents = _exponents(flat.unflatten(0, (-1, GROUP)).abs().amax(1), quantizer.dtype)
        data = as_bytes(flat * torch.exp2(-exponents).repeat_interleave(GROUP, 0), quantizer.dtype)
        output._columnwise_data.copy_(data.view_as(output._columnwise_data))
        _put(output._columnwise_scale_inv, exponents)


def _put(padded: torch.Tensor, exponents: torch.Tensor) -> None:
    """Copy scales into their buffer, which is padded to whole tiles of 128 x 4."""
    padded.zero_()
    padded[: exponents.shape[0], : exponents.shape[1]].copy_(exponents + BIAS)


def values_of(tensor: Any, rowwise: bool) -> torch.Tensor:
    """Return the row-wise or column-wise copy as a matrix in fp32."""
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    scales = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
    assert data is not None, f"a product reads {'rows' if rowwise else 'columns'} of an MXFP8 tensor that has none"
    values = data.reshape(-1, data.shape[-1]).view(torch_dtype(tensor._fp8_dtype)).float()
    shape = list(values.shape)
    shape[int(rowwise)] //= GROUP
    powers = torch.exp2(scales[: shape[0], : shape[1]].float() - BIAS)
    return values * powers.repeat_interleave(GROUP, int(rowwise))
