"""Token and row counts as people write them: `1.7T`, `250B`, `8_500_000_000`, `4096`, `2.5e9`."""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_ettin.base.errors import UserError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*\.?[0-9]*(?:[eE][+]?[0-9]+)?)\s*([KMBGT]?)(?:tok(?:ens)?)?", re.IGNORECASE)


def parse_count(text: str | int | float, key: str) -> int:
    """The whole number that `text` means. `key` names the setting in the error. Raises UserError."""
    match = _COUNT.fullmatch(str(text).strip())
    if match is None:
        raise UserError(f"{key}: {text!r} is not a count; write 4096, 8_500_000_000, 250B or 1.7T")
    value = Decimal(match[1].replace("_", "")) * SUFFIXES[match[2].upper()]
    if value != int(value):
        raise UserError(f"{key}: {text!r} is {value}, not a whole number")
    return int(value)


def format_count(count: float) -> str:
    """A count for people, three digits: 1.7T, 250B, 16.9M, 512."""
    for suffix, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return f"{count:g}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 row`, `2,000 rows`.

    Args:
        plural: of a noun that takes more than an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """`3d 4h`, `2h 5m`, `40s`."""
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    for index, (name, size) in enumerate(units):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            if index + 1 == len(units):
                return f"{whole}{name}"
            below, small = units[index + 1]
            return f"{whole}{name} {rest // small}{below}"
    return "0s"
