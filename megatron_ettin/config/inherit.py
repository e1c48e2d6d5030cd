"""Which of a model's settings a run takes over from the weights that it begins from.

Weights are of a shape and were trained under windows, an epsilon and rotary bases; the recipe's tables know those of
the published sizes. What the weights say stands between the tables and what the user writes: a ModernBERT's local base
of 10,000 must not become the recipe's 160,000 because nobody mentioned it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ettin.config.phases import PHASES
from megatron_ettin.config.sizes import SIZES

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
FIXED = ("vocab_size", "global_attention_every", "encoder_window", "decoder_window_keys", "norm_eps")
BASES = ("global_rope_theta", "local_rope_theta")


def inherited(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `model` that come with weights whose config.yaml has the groups `source`.

    A published shape is left to --size, so that another one is refused rather than taken. The rotary bases of a run
    that followed the recipe are left to the recipe, which changes them from phase to phase; others are kept."""
    model, run = source.get("model") or {}, source.get("run") or {}
    keys = [*FIXED]
    if not any(all(model.get(key) == getattr(shape, key) for key in SHAPE) for shape in SIZES.values()):
        keys += SHAPE
    if not _follows_the_recipe(model, run):
        keys += BASES
    return {key: model[key] for key in keys if model.get(key) is not None}


def _follows_the_recipe(model: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether the rotary bases are those of the source's own phase and size."""
    phase, size = PHASES.get(str(run.get("phase"))), str(run.get("size"))
    if phase is None or size not in SIZES:
        return False
    bases = (phase.global_rope_theta, phase.local_rope_theta[size])
    return tuple(model.get(key) for key in BASES) == bases


def told(kept: Mapping[str, Any], recipe: Any, final: Any) -> list[str]:
    """A line for every inherited key that the run uses and the recipe has otherwise. Both are ModelConfigs."""
    return [
        f"model.{key}={value} comes with the weights (the recipe has {getattr(recipe, key)})"
        for key, value in kept.items()
        if key not in SHAPE and getattr(final, key) == value != getattr(recipe, key)
    ]
