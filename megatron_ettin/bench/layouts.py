"""What a benchmark runs through: every combination of --layouts, --precision and --sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.sweep import Member, members

AXES = ("tp", "pp", "vp", "cp")
PART = re.compile(r"(tp|pp|vp|cp)([1-9][0-9]*)|sp|dp")


def combinations(layouts: str | None, precisions: str | None, sweeps: Sequence[str]) -> list[Member]:
    """Members of the sweep, layouts changing slowest; one without values where nothing is swept. Raises UserError."""
    sweeps = [*([f"precision.name={precisions}"] if precisions is not None else []), *sweeps]
    inner = members(sweeps) if sweeps else [Member("", {})]
    if layouts is None:
        return inner
    outer = layout_values(layouts)
    if twice := sorted(outer[0].keys() & inner[0].values.keys()):
        raise UserError(f"--sweep {twice[0]}: is of --layouts already")
    found = [layout | member.values for layout in outer for member in inner]
    return [Member(" ".join(f"{key}={value}" for key, value in values.items()), values) for values in found]


def layout_values(text: str) -> list[dict[str, str]]:
    """`dp,tp2,tp2pp2` -> keys and values of each; an axis that one of them names is set in all. Raises UserError."""
    found = [_degrees(name.strip()) for name in text.split(",")]
    axes = [axis for axis in AXES if any(axis in degrees for degrees in found)] or ["tp"]
    is_cut = any("sp" in degrees for degrees in found)
    rows = []
    for degrees in found:
        values = {f"parallel.{axis}": degrees.get(axis, "1") for axis in axes}
        if is_cut:
            values["parallel.sequence_parallel"] = str("sp" in degrees).lower()
        if values in rows:
            raise UserError(f"--layouts {text}: two of them are the same")
        rows.append(values)
    return rows


def _degrees(name: str) -> dict[str, str]:
    """`tp2pp4sp` -> {tp: 2, pp: 4, sp: }."""
    parts = list(PART.finditer(name))
    degrees = {part[1] or part[0]: part[2] or "" for part in parts}
    if not name or "".join(part[0] for part in parts) != name or len(degrees) < len(parts):
        raise UserError(
            f"--layouts: {name!r}: write tp, pp, vp or cp with a degree, and sp for sequence parallelism, such as"
            " dp,tp2,tp2sp,tp2pp2; what is left of the ranks is data-parallel"
        )
    return degrees
