"""Read the science keys that a run directory's config.yaml fixes for good.

Up to the version that judged spikes by the mean and standard deviation of loss and norm, what becomes of a bad step was
no science key: such a run goes on under the new rule, and its record alone says which of its updates were left out."""

from __future__ import annotations

from pathlib import Path

from megatron_ettin.config.checks import GUARD_KEYS, science_keys
from megatron_ettin.config.layers import read_yaml
from megatron_ettin.config.resolve import from_yaml


def stored_science_keys(path: Path) -> dict[str, object]:
    """Return the science keys of a config.yaml, without the guard's where it is of a version that did not fix them.
    Raises UserError."""
    keys = science_keys(from_yaml(path))
    if fixes_guard(path):
        return keys
    return {key: value for key, value in keys.items() if key not in GUARD_KEYS}


def fixes_guard(path: Path) -> bool:
    """Return whether a config.yaml is of a version that has the guard's keys among its science keys."""
    return "spike_ratio" in (read_yaml(path).get("resilience") or {})
