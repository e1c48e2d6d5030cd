"""Keep FP8 state: the scales of delayed scaling, and weights stored in FP8.

Delayed scaling keeps a scale for each input, weight and gradient of a linear and the maxima it came from; without them
a resumed run would begin with scales of one. Transformer Engine keeps them in a linear's `fp8_meta` and would pickle
them into `_extra_state`; checkpoints have a few named tensors instead. They are equal on all tensor-, data- and
context-parallel ranks, because core reduces the maxima over all of these in every step: one copy is stored, and any
layout reads it.

Weights stored in FP8 (`precision.fp8_weights`) are Transformer Engine's quantized tensors. Core makes them
(`fp8_param`), gathers their bytes and casts masters to them. This module adds what core leaves out: the exact values
that the fp32 masters begin with, and the transposed copies for backward after a gather outside of the forward pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

_DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}


def delayed_scales(linear: Any) -> dict[str, torch.Tensor]:
    """Return the scales and maxima of a module's delayed scaling by name; {} if it has none yet.

    They are the tensors in use, so that writing to them changes the module's state.
    """
    tensors: dict[str, torch.Tensor] = {}
    for direction, key in _DIRECTIONS.items():
        state: Any = getattr(linear, "fp8_meta", {}).get(key)
        # other recipes compute their scales from the current values
        if hasattr(state, "amax_history"):
            tensors[f"{direction}.scale"], tensors[f"{direction}.amax_history"] = state.scale, state.amax_history
    return tensors


@contextlib.contextmanager
def preserve_fp8_state(chunks: Sequence[Any]) -> Iterator[None]:
    """Restore the scales of these model chunks after the forward passes inside the context.

    Without this, the values of an evaluation would count in the maxima of the next step and change the training.
    """
    linears = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")]
    before = [{name: tensor.clone() for name, tensor in delayed_scales(linear).items()} for linear in linears]
    yield
    for linear, kept in zip(linears, before, strict=True):
        for name, tensor in delayed_scales(linear).items():
            if name in kept:
                tensor.copy_(kept[name])
            # these passes made it: reset it to what the first training step would make
            else:
                tensor.fill_(1.0 if name.endswith(".scale") else 0.0)


def reset_fp8_state() -> None:
    """Release the scales that Transformer Engine keeps outside of the model.

    Otherwise the next model in this process would reduce them too, over process groups that no longer exist.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()


def make_delayed_scales(linear: Any, config: Any) -> None:
    """Create the tensors that a Transformer Engine linear would create in its first forward pass, to load into them.

    These are the steps of TE's own set_extra_state. `config` is core's TransformerConfig.
    """
    if delayed_scales(linear):
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config)
    linear.fp8_meta.update(num_gemms=1, recipe=recipe)
    linear.init_fp8_meta_tensors(recipe)


def is_fp8(tensor: Any) -> bool:
    """Return whether a tensor is one of Transformer Engine's with FP8 data; False without Transformer Engine."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(tensor))


def set_weight(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter's initial value, rounded to its type.

    For a parameter in FP8, Transformer Engine also keeps on the host the value that its fp32 master will begin with.
    That value is set too.
    """
    # rounded first, so that FP8 weights are the same wherever they are cast
    value = value.to(parameter.dtype)
    parameter.copy_(value)
    kept = getattr(parameter, "_high_precision_init_val", None)
    if kept is not None:
        kept.copy_(value)


def raw_data(tensor: Any) -> torch.Tensor:
    """Return the tensor that stores a weight's bits: its bytes if it is FP8, else the weight itself."""
    if is_fp8(tensor):
        tensor = tensor._rowwise_data if hasattr(tensor, "_rowwise_data") else tensor._data
    assert isinstance(tensor, torch.Tensor)
    return tensor


def finish_gather(parameters: Iterable[torch.Tensor]) -> None:
    """Make the transposed copies of FP8 weights that backward reads; call it after their bytes are gathered."""
    gathered = [p for p in parameters if is_fp8(p)]
    if gathered:
        from megatron.core.fp8_utils import post_all_gather_processing

        post_all_gather_processing(gathered)
