"""`data.validation`: what a run is evaluated on, as names and paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from megatron_ettin.base.errors import UserError

FORMS = "a DATASET path, a list of paths or {name: path}"
HELD_OUT = "heldout"  # the folder that `ettin prepare --holdout` makes within a dataset


def validation_sets(value: Any, key: str = "data.validation") -> dict[str, str]:
    """Name -> dataset path, in the order given. A path without a name is called after its folder (`heldout` after the
    one above it), or by itself where two are called the same. Raises UserError."""
    if isinstance(value, Mapping):
        named = {str(name): path for name, path in value.items()}
    else:
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence):
            raise UserError(f"{key}: {value!r}; give {FORMS}")
        short = [name_of(path) if isinstance(path, str) else "" for path in paths]
        uses = Counter(short)
        pairs = zip(short, paths, strict=True)
        named = {name if uses[name] == 1 else str(path): path for name, path in pairs}
        if len(named) != len(paths):
            raise UserError(f"{key}: a dataset is given twice; give each once")
    for name, path in named.items():
        if not isinstance(path, str) or not path.strip() or not name.strip():
            raise UserError(f"{key}: {path!r} is no path; give {FORMS}")
    if not named:
        raise UserError(f"{key}: empty; give {FORMS}")
    return named


def name_of(path: str) -> str:
    parts = PurePath(path).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == HELD_OUT else parts[-1] if parts else path
