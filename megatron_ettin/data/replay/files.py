"""The parquet files of a given order: which, in what sequence, and of which kind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.parsing import load_json

METADATA_KEY = b"megatron_ettin.order"  # in the schema of what `ettin order --out` writes
# kind -> the columns by which it is known
KINDS = {"exported": ("step", "slot", "dataset", "chunk"), "published": ("input_ids",)}


@dataclass(frozen=True)
class RecordedRows:
    """Some rows of a given order, n of them with m chunks in all."""

    sources: npt.NDArray[np.int64]  # [n] places in the mixture
    counts: npt.NDArray[np.int64]  # [n] chunks of each
    chunks: npt.NDArray[np.int64]  # [m]
    tokens: npt.NDArray[np.int64]  # [n]
    rows: npt.NDArray[np.int64]  # [n] number in the source's row plan, or place in the order where there is none
    skipped_samples: int = 0
    nominal_tokens: float | None = None  # mean tokens a row of the corpus the order came from


@dataclass(frozen=True)
class OrderFiles:
    paths: list[Path]
    identity: list[tuple[str, int, int]]  # name, bytes, time of change: what a compiled order belongs to


def open_order_files(given: str) -> OrderFiles:
    """The files of `data.order`, sorted by the numbers in their names. Raises UserError."""
    root = Path(given).expanduser()
    if not root.exists():
        raise UserError(f"data.order: {given!r} is no file or folder; give `keyed`, ORDER.parquet or a folder of them")
    paths = [root] if root.is_file() else sorted(root.rglob("[!.]*.parquet"), key=lambda path: by_numbers(root, path))
    if not paths:
        raise UserError(f"data.order: {given}: no .parquet file in it")
    status = [path.stat() for path in paths]
    names = [path.name if path == root else str(path.relative_to(root)) for path in paths]
    identity = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, status, strict=True)]
    return OrderFiles(paths, identity)


def by_numbers(root: Path, path: Path) -> tuple[list[int], str]:
    """`checkpoint_000123/steps_20_to_29.parquet` -> 123, 20, 29: as numbers, since widths differ."""
    name = str(path.relative_to(root))
    return [int(digits) for digits in re.findall(r"\d+", name)], name


def kind_of_files(files: OrderFiles) -> str:
    """The one kind of all of them. Raises UserError."""
    kinds = {kind_of(path): path for path in reversed(files.paths)}
    if len(kinds) > 1:
        told = " and ".join(f"{path} ({kind})" for kind, path in kinds.items())
        raise UserError(f"data.order: files of two kinds, {told}; keep them apart")
    return next(iter(kinds))


def kind_of(path: Path) -> str:
    names = open_parquet(path).schema_arrow.names
    for kind, columns in KINDS.items():
        if set(columns) <= set(names):
            return kind
    raise UserError(
        f"data.order: {path}: columns {', '.join(names)}; wanted input_ids, or those of `ettin order --out`"
        f" ({', '.join(KINDS['exported'])})"
    )


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises UserError for what is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"data.order: {path}: not a readable parquet file ({first_line(error)})") from None


def metadata_of(path: Path) -> dict[str, Any]:
    """What `ettin order --out` noted in the file; empty for others."""
    raw = (open_parquet(path).schema_arrow.metadata or {}).get(METADATA_KEY)
    try:
        found = load_json(raw) if raw else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
