"""The state that FP8 has with delayed scaling: a scale for each input, weight and gradient of a linear, and the largest
values it came from. Without it a resumed run would begin with scales of one.

Transformer Engine keeps it in a linear's `fp8_meta` and would pickle it into `_extra_state`. Here it is a few named
tensors. They are equal on all tensor-, data- and context-parallel ranks, because core reduces the largest values over
all of them at every step: one copy of each is stored, and any layout reads it.

Weights that live in FP8 (`precision.fp8_weights`): Transformer Engine's quantized tensors as a model's parameters.

Core makes them (`fp8_param`), gathers their bytes and casts masters to them. What is here is what it leaves open:
values beyond FP8's digits, which the fp32 masters begin with, and the copies for the backward pass after a gather that
core does not follow up."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

_DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}


def delayed_scales(linear: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor of one module: those in use, which writing to them changes. {} where it has none (yet)."""
    found: dict[str, torch.Tensor] = {}
    for direction, key in _DIRECTIONS.items():
        state: Any = getattr(linear, "fp8_meta", {}).get(key)
        if hasattr(state, "amax_history"):  # other recipes compute their scales from the values at hand
            found[f"{direction}.scale"], found[f"{direction}.amax_history"] = state.scale, state.amax_history
    return found


@contextlib.contextmanager
def preserve_fp8_state(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, passes forward leave no trace in the scales: what they quantize counts among the largest values of the
    next step, and a run that is evaluated would train on as another one."""
    linears = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")]
    before = [{name: tensor.clone() for name, tensor in delayed_scales(linear).items()} for linear in linears]
    yield
    for linear, kept in zip(linears, before, strict=True):
        for name, tensor in delayed_scales(linear).items():
            if name in kept:
                tensor.copy_(kept[name])
            else:  # made by these passes: as the first of training would make it
                tensor.fill_(1.0 if name.endswith(".scale") else 0.0)


def reset_fp8_state() -> None:
    """Let go of the scales that Transformer Engine notes beside the model it made them for. The next model of this
    process would reduce them too, over groups that are gone: a phase after a phase, a layout after a layout."""
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()


def make_delayed_scales(linear: Any, config: Any) -> None:
    """Give a linear of Transformer Engine the tensors that it would make at its first forward pass, so that they can be
    loaded before it; these are the steps of TE's own set_extra_state. `config`: core's TransformerConfig."""
    if delayed_scales(linear):
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config)
    linear.fp8_meta.update(num_gemms=1, recipe=recipe)
    linear.init_fp8_meta_tensors(recipe)


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
