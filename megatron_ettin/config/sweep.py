"""A sweep: the same run with every combination of some keys' values, as `--sweep optim.lr=1e-3,2e-3` says them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.config.key_names import nearest_key
from megatron_ettin.config.layers import key_types

NAMES = ("size", "objective")  # options that may be swept besides keys
MOST_MEMBERS = 1000


class Member(NamedTuple):
    """One run of a sweep: its folder's name, and the values of the swept keys as they were written."""

    name: str
    values: dict[str, str]

    @property
    def words(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items() if key not in NAMES]


def members(sweeps: Sequence[str]) -> list[Member]:
    """Every combination, the last key changing fastest. Raises UserError."""
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not equals or not all(values):
            raise UserError(f"--sweep {sweep!r}: write KEY=VALUE,VALUE,... such as optim.lr=1e-3,2e-3")
        if key not in NAMES and key not in key_types():
            raise UserError(f"--sweep {sweep!r}: no such key{nearest(key, NAMES) or nearest_key(key, key_types())}")
        if key in axes:
            raise UserError(f"--sweep {sweep!r}: {key} is swept twice")
        if len(set(values)) < len(values) or any("/" in value for value in values):
            raise UserError(f"--sweep {sweep!r}: values must differ, and have no slash, for they name folders")
        axes[key] = values
    found = [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*axes.values())]
    if len(found) > MOST_MEMBERS:
        raise UserError(f"--sweep: {len(found)} combinations; at most {MOST_MEMBERS}")
    return [
        Member(" ".join(f"{key}={value}" for key, value in values.items()).replace(" ", "_"), values)
        for values in found
    ]
