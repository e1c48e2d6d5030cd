"""Weights that live in FP8 (`precision.fp8_weights`): Transformer Engine's quantized tensors as a model's parameters.

Core makes them (`fp8_param`), gathers their bytes and casts masters to them. What is here is what it leaves open:
values beyond FP8's digits, which the fp32 masters begin with, and the copies for the backward pass after a gather that
core does not follow up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def is_fp8(tensor: Any) -> bool:
    """Whether a tensor is Transformer Engine's, with FP8 inside. False wherever that is not installed."""
    from megatron.core.fp8_utils import is_float8tensor

    return is_float8tensor(tensor)


def set_weight(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter its initial value, rounded to its type. Of one in FP8 Transformer Engine keeps what it was made
    of on the host, for who makes masters; that is the value's place too, or masters would begin as something else."""
    value = value.to(parameter.dtype)  # first, so that weights are the same FP8 numbers wherever they are cast
    parameter.copy_(value)
    kept = getattr(parameter, "_high_precision_init_val", None)
    if kept is not None:
        kept.copy_(value)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a weight's bits are in: its bytes where it is FP8, itself where it is not."""
    if not is_fp8(tensor):
        return tensor
    return tensor._rowwise_data if hasattr(tensor, "_rowwise_data") else tensor._data  # type: ignore[attr-defined]


def finish_gather(parameters: Iterable[torch.Tensor]) -> None:
    """After all bytes of the weights came: the transposed copies that products of the backward pass read."""
    gathered = [p for p in parameters if is_fp8(p)]
    if gathered:
        from megatron.core.fp8_utils import post_all_gather_processing

        post_all_gather_processing(gathered)
