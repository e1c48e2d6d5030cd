"""Quantize to FP8 and back: per tensor by a given scale (delayed) or its own (current), in blocks of 128,
microscaled."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.emulated_te import microscaled
from tests.emulated_te.fp8_types import as_bytes, largest, torch_dtype

KERNELS = [
    "quantize",
    "dequantize",
    "bgrad_quantize",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "swap_first_dims",
    "compute_amax",
    "multi_tensor_scale",
    "multi_tensor_compute_scale_and_scale_inv",
    "fp8_block_scaling_compute_partial_amax",
    "fp8_block_scaling_partial_cast",
]
BLOCK = 128


def scale_for(amax: torch.Tensor, dtype: Any, power_of_2: bool, epsilon: float) -> torch.Tensor:
    """Return the factor applied to values, as compute_scale_from_amax of TE's common library does."""
    amax = amax.clamp_min(epsilon)
    scale = largest(dtype) / amax
    scale = torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)
    scale = torch.where(scale.isinf(), torch.full_like(scale, torch.finfo(torch.float32).max), scale)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def transposed(data: torch.Tensor) -> torch.Tensor:
    """Move the last dimension to the front."""
    return data.permute(data.ndim - 1, *range(data.ndim - 1)).contiguous()


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    from transformer_engine.pytorch import tensor as te_tensor

    if noop is not None and float(noop):
        return output
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if quantizer.internal:
            output = _storage_of(output)
    source = tensor.detach().float().contiguous()
    if isinstance(quantizer, te_tensor.Float8BlockQuantizer):
        _quantize_blocks(source, quantizer, output)
    elif isinstance(quantizer, te_tensor.MXFP8Quantizer):
        microscaled.quantize(source, quantizer, output)
    elif isinstance(quantizer, te_tensor.Float8CurrentScalingQuantizer):
        if not quantizer.use_existing_amax:
            quantizer.amax.copy_(source.abs().max() if source.numel() else torch.zeros(()))
        if quantizer.with_amax_reduction:
            dist.all_reduce(quantizer.amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = scale_for(quantizer.amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
        quantizer.scale.copy_(scale)
        _quantize_tensor(source, quantizer, output)
    elif isinstance(quantizer, te_tensor.Float8Quantizer):
        # made only if it is requested
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, source.abs().max().view_as(quantizer.amax)))
        _quantize_tensor(source, quantizer, output)
    else:
        raise NotImplementedError(f"{type(quantizer).__name__} is not emulated")
    return output


def _storage_of(tensor: Any) -> Any:
    """Return the storage class of a quantized tensor, which TE keeps inside a layer."""
    storage = next(base for base in type(tensor).__mro__ if base.__name__ == f"{type(tensor).__name__}Storage")
    return storage(**tensor.get_metadata())


def _quantize_tensor(source: torch.Tensor, quantizer: Any, output: Any) -> None:
    data = as_bytes(source * quantizer.scale, quantizer.dtype)
    output._scale_inv.copy_(1.0 / quantizer.scale)
    if output._data is not None:
        output._data.copy_(data)
    output._transpose_invalid = True
    if output._transpose is not None:
        output._transpose.copy_(transposed(data))
        output._transpose_invalid = False


def _quantize_blocks(source: torch.Tensor, quantizer: Any, output: Any) -> None:
    flat = source.reshape(-1, source.shape[-1])
    tall = BLOCK if quantizer.block_scaling_dim == 2 else 1
    if output._rowwise_data is not None:
        data, inverse = _blocks(flat, quantizer, tall)
        output._rowwise_data.copy_(data.view_as(output._rowwise_data))
        _put(output._rowwise_scale_inv, inverse if tall > 1 else inverse.T)
    if output._columnwise_data is not None:
        data, inverse = _blocks(flat.T.contiguous(), quantizer, tall)
        output._columnwise_data.copy_(data.view_as(output._columnwise_data))
        _put(output._columnwise_scale_inv, inverse if tall > 1 else inverse.T)


def _blocks(source: torch.Tensor, quantizer: Any, tall: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of a matrix and the inverse scale of each block of tall x 128."""
    rows, columns = source.shape
    padded = F.pad(source, (0, -columns % BLOCK, 0, -rows % tall))
    # [a, tall, b, 128]
    tiles = padded.unflatten(0, (-1, tall)).unflatten(2, (-1, BLOCK))
    amax = tiles.abs().amax((1, 3))
    scale = scale_for(amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = as_bytes(tiles * scale[:, None, :, None], quantizer.dtype)
    return data.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), 1.0 / scale


def _put(padded: torch.Tensor, values: torch.Tensor) -> None:
    """Copy scales into their buffer, which is padded to a multiple of four."""
    padded.zero_()
    padded[: values.shape[0], : values.shape[1]].copy_(values)


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    if hasattr(tensor, "_rowwise_data"):
        return values_of(tensor, rowwise=True).view(tensor._rowwise_data.shape).to(torch_dtype(dtype))
    return (tensor._data.view(torch_dtype(tensor._fp8_dtype)).float() * tensor._scale_inv).to(torch_dtype(dtype))


def values_of(tensor: Any, rowwise: bool) -> torch.Tensor:
    """Return an operand of a product as a matrix in fp32. Quantized operands must have the copy of that direction.

    Hopper multiplies FP8 in one layout only, so a tensor has one copy for each direction."""
    from transformer_engine.pytorch import tensor as te_tensor
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    if isinstance(tensor, te_tensor.MXFP8TensorStorage):
        return microscaled.values_of(tensor, rowwise)
    if isinstance(tensor, te_tensor.Float8TensorStorage):
        if rowwise:
            data = tensor._data
            assert data is not None, "a product reads rows of an FP8 tensor that has none"
        else:
            # devices that multiply FP8 in any layout keep a single copy of a tensor with one scale
            if is_non_tn_fp8_gemm_supported():
                return values_of(tensor, rowwise=True)
            assert tensor._transpose is not None, "no valid transpose to read"
            assert not tensor._transpose_invalid, "no valid transpose to read"
            data = tensor._transpose
        values = data.view(torch_dtype(tensor._fp8_dtype)).float() * tensor._scale_inv
        return values.reshape(-1, values.shape[-1]) if rowwise else values.reshape(values.shape[0], -1).T
    if isinstance(tensor, te_tensor.Float8BlockwiseQTensorStorage):
        data = tensor._rowwise_data if rowwise else tensor._columnwise_data
        inverse = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
        assert data is not None, f"a product reads {'rows' if rowwise else 'columns'} of an FP8 tensor that has none"
        matrix = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
        values = _from_blocks(matrix.view(torch_dtype(tensor._fp8_dtype)).float(), inverse, tensor._is_2D_scaled)
        return values if rowwise else values.T
    return tensor.detach().float().reshape(-1, tensor.shape[-1])


def _from_blocks(values: torch.Tensor, inverse: torch.Tensor, square: bool) -> torch.Tensor:
    rows, columns = values.shape
    wide = math.ceil(columns / BLOCK)
    if square:
        scales = inverse[: math.ceil(rows / BLOCK), :wide].repeat_interleave(BLOCK, 0)[:rows]
    else:
        scales = inverse[:wide, :rows].T
    return values * scales.repeat_interleave(BLOCK, 1)[:, :columns]


def bgrad_quantize(gradient: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


def fp8_transpose(data: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    result = transposed(data)
    return result if out is None else out.copy_(result)


def swap_first_dims(tensor: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    result = tensor.transpose(0, 1).contiguous()
    return result if out is None else out.copy_(result)


def compute_amax(tensor: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(tensor.abs().max())


def fused_amax_and_scale_update_after_reduction(
    reduced: torch.Tensor,
    histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    algorithm: str,
    dtype: Any,
    margin: float,
) -> None:
    """Update delayed scaling: append this step's amax to the histories, whose maximum sets the scales."""
    parts = reduced.split([history.shape[1] for history in histories])
    for newest, history, scale in zip(parts, histories, scales, strict=True):
        shifted = torch.cat([history[1:], newest[None]])
        amax = shifted.amax(0) if algorithm == "max" else newest
        # the slot that collects the next step's amax
        shifted[0] = 0.0
        history.copy_(shifted if len(history) > 1 else newest[None])
        wanted = largest(dtype) / amax / 2.0**margin
        scale.copy_(torch.where((amax > 0) & amax.isfinite() & wanted.isfinite(), wanted, scale))


def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], limit: float, power_of_2: bool, epsilon: float
) -> None:
    import transformer_engine_torch as tex

    dtype = next(d for d in (tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2) if largest(d) == limit)
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_for(amax, dtype, power_of_2, epsilon))
        inverse.copy_(1.0 / scale)


def _with_blocks(part: torch.Tensor, height: int, width: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 128 x 128 block (row, column) of each element in a range of a flattened matrix."""
    element = torch.arange(start, start + part.numel())
    assert start + part.numel() <= height * width
    return element // width // BLOCK, element % width // BLOCK


def fp8_block_scaling_compute_partial_amax(
    part: torch.Tensor, amax: torch.Tensor, height: int, width: int, start: int, block: int
) -> None:
    rows, columns = _with_blocks(part, height, width, start)
    flat = amax.view(-1)
    flat.scatter_reduce_(0, rows * amax.shape[1] + columns, part.reshape(-1).float().abs(), "amax")


def fp8_block_scaling_partial_cast(
    part: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    height: int,
    width: int,
    start: int,
    block: int,
    dtype: Any,
) -> None:
    rows, columns = _with_blocks(part, height, width, start)
    out.copy_(as_bytes(part.reshape(-1).float() * scale[rows, columns], dtype))
