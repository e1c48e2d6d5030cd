"""Find the parquet files of a recorded order, their sequence and their format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.base.parsing import load_json

# key in the schema metadata of files that `ettin order --out` writes
METADATA_KEY = b"megatron_ettin.order"
# format -> columns that identify it
FORMATS = {"exported": ("step", "slot", "dataset", "chunk"), "published": ("input_ids",)}


@dataclass(frozen=True)
class RecordedRows:
    """Consecutive rows of a recorded order: n rows with m chunks in all."""

    sources: npt.NDArray[np.int64]
    """Index [n] of each row's dataset in the mixture."""
    chunks_per_row: npt.NDArray[np.int64]
    """Number of chunks of each row [n]."""
    chunks: npt.NDArray[np.int64]
    """Chunk numbers [m], row after row."""
    tokens: npt.NDArray[np.int64]
    """Number of tokens of each row [n]."""
    rows: npt.NDArray[np.int64]
    """Row number [n] in the dataset's packing index; the order index if the file has none."""
    skipped_samples: int = 0
    """Number of samples left out because no dataset has them."""
    nominal_tokens: float | None = None
    """Mean tokens of a row of the data that the order was exported from; None if unknown."""


def list_order_files(given: str) -> tuple[list[Path], list[tuple[str, int, int]]]:
    """List the files of `data.order`, sorted by the numbers in their names.

    Returns:
        Paths, and (name, bytes, mtime in ns) of each, which are part of the cache key of the compiled order.

    Raises:
        UserError: there is no such file.
    """
    root = Path(given).expanduser()
    if not root.exists():
        raise UserError(
            f"data.order: {given!r} is not a file or folder; give keyed, ORDER.parquet or a folder of these"
        )
    files = [root] if root.is_file() else root.rglob("[!.]*.parquet")
    paths = sorted(files, key=lambda path: natural_sort_key(root, path))
    if not paths:
        raise UserError(f"data.order: {given}: no .parquet file in it")
    status = [path.stat() for path in paths]
    names = [path.name if path == root else str(path.relative_to(root)) for path in paths]
    return paths, [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, status, strict=True)]


def natural_sort_key(root: Path, path: Path) -> tuple[list[int], str]:
    """Return the sort key of a file: its numbers, whose widths may differ, then its name below `root`."""
    name = str(path.relative_to(root))
    return [int(digits) for digits in re.findall(r"\d+", name)], name


def common_format(paths: Sequence[Path]) -> str:
    """Return the format of the files. Raises UserError if they have several."""
    formats = {format_of(path): path for path in reversed(paths)}
    if len(formats) > 1:
        named = " and ".join(f"{path} ({name})" for name, path in formats.items())
        raise UserError(f"data.order: files of two formats, {named}; give them to runs of their own")
    return next(iter(formats))


def format_of(path: Path) -> str:
    """Return the format (key of FORMATS) that a file's columns identify. Raises UserError if there is none."""
    names = open_parquet(path).schema_arrow.names
    for name, columns in FORMATS.items():
        if set(columns) <= set(names):
            return name
    raise UserError(
        f"data.order: {path}: columns {', '.join(names)}; wanted input_ids, or those of `ettin order --out`"
        f" ({', '.join(FORMATS['exported'])})"
    )


def open_parquet(path: Path) -> Any:
    """Open a pyarrow ParquetFile. Raises UserError if it cannot be read as one."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"data.order: {path}: not a readable parquet file ({first_line(error)})") from None


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the metadata that `ettin order --out` wrote into the file; empty for other files."""
    raw = (open_parquet(path).schema_arrow.metadata or {}).get(METADATA_KEY)
    try:
        notes = load_json(raw) if raw else {}
    except ValueError:
        return {}
    return notes if isinstance(notes, dict) else {}
