"""Declare a configuration key once: its default, what it does, its unit, and which values it may have.

`key` makes the dataclass field of a group in schema.py and stores a `Key` in its metadata. Checks, completion, science
keys and docs/config.md (reference.py) read it from there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any

METADATA = "key"


@dataclass(frozen=True, kw_only=True)
class Key:
    """Meaning and allowed values of a configuration key. None is always allowed if the type is optional."""

    doc: str
    unit: str = ""
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    zero: str = ""
    """Meaning of the value 0, for the text of the range."""
    infinite: bool = False
    """Whether infinity is allowed."""
    choices: tuple[str, ...] = ()
    science: bool | str = False
    """True if the key must not change within a run directory; a text says in which runs it must not."""
    parse: Callable[[Any, str], Any] | None = None
    """Function of (value, key) that converts a value of a user or a stored config.yaml, older forms too."""
    path: bool = False
    """Whether values name files or folders, which shells then complete."""

    def allows(self, value: float) -> bool:
        """Return whether a number is in the key's range. NaN is in none that has a bound."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.infinite or math.isfinite(value))
        )

    @property
    def is_bounded(self) -> bool:
        """Return whether the key has a range."""
        return any(bound is not None for bound in (self.above, self.at_least, self.at_most, self.below))

    @property
    def range(self) -> str:
        """Return the allowed numbers as text, such as `at least 0 and at most 1`; empty if there is no range."""
        bounds = {"above": self.above, "at least": self.at_least, "at most": self.at_most, "below": self.below}
        limits = [f"{name} {bound:,}".removesuffix(".0") for name, bound in bounds.items() if bound is not None]
        return f"0 ({self.zero}) or above" if self.zero else " and ".join(limits)


def key(doc: str, default: Any = MISSING, **about: Any) -> Any:
    """Declare a key as a dataclass field.

    Args:
        doc: what the key does, as docs/config.md shows it.
        default: its default; a key without one gets its value from the recipe's tables.
        about: the other fields of `Key`.
    """
    metadata = {METADATA: Key(doc=doc, **about)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


science_key = functools.partial(key, science=True)
