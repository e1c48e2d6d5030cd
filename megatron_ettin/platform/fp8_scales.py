"""The state that FP8 has with delayed scaling: a scale for each input, weight and gradient of a linear, and the largest
values it came from. Without it a resumed run would begin with scales of one.

Transformer Engine keeps it in a linear's `fp8_meta` and would pickle it into `_extra_state`. Here it is a few named
tensors. They are equal on all tensor-, data- and context-parallel ranks, because core reduces the largest values over
all of them at every step: one copy of each is stored, and any layout reads it."""

from __future__ import annotations

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


def make_delayed_scales(linear: Any, config: Any) -> None:
    """Give a linear of Transformer Engine the tensors that it would make at its first forward pass, so that they can be
    loaded before it; these are the steps of TE's own set_extra_state. `config`: core's TransformerConfig."""
    if delayed_scales(linear):
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config)
    linear.fp8_meta.update(num_gemms=1, recipe=recipe)
    linear.init_fp8_meta_tensors(recipe)
