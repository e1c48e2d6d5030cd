"""Name models: by the published size if the shape is exactly that one, else by the number of parameters.

`run.size` names the recipe that a run began with; its keys may have given the model any other shape since."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ettin.base.counts import format_count
from megatron_ettin.config.sizes import SIZES, VOCABULARY, Shape, parameter_count


def short_name(size: object, model: object) -> str:
    """Return `17m` for a model of that published shape and vocabulary, else its parameter count, such as `176K`.

    Args:
        size: `run.size`.
        model: the `model` group, resolved or as a config.yaml has it. Where that says no shape, the size is returned.
    """
    shape = _shape(model)
    if shape is None or (SIZES.get(str(size)), VOCABULARY) == shape:
        return str(size or "?")
    return format_count(parameter_count(*shape))


def long_name(size: object, model: object) -> str:
    """Return `16.9M parameters, 7 layers x 256`, and for a model of another shape than its size's also that it is
    `(from 17m)`; empty where the group says no shape. Args as in `short_name`."""
    found = _shape(model)
    if found is None:
        return ""
    shape, vocabulary = found
    other = f", vocabulary {vocabulary:,}" if vocabulary != VOCABULARY else ""
    origin = f" (from {size})" if size in SIZES and short_name(size, model) != size else ""
    told = f"{format_count(parameter_count(shape, vocabulary))} parameters"
    return f"{told}, {shape.num_layers} layers x {shape.hidden_size:,}{other}{origin}"


def _shape(model: object) -> tuple[Shape, int] | None:
    def value(key: str) -> Any:
        return model.get(key) if isinstance(model, Mapping) else getattr(model, key, None)

    keys = [field.name for field in dataclasses.fields(Shape)]
    numbers = [value(key) for key in (*keys, "vocab_size")]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return Shape(*numbers[:-1]), numbers[-1]
