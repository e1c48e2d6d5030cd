"""Hugging Face folders where a checkpoint is asked for: `--init-from`, `ettin eval`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import RankError
from megatron_ettin.convert.hf_config import from_hf_config

WAIT_SECONDS = 3_600.0  # for the rank that imports


def is_hf_folder(path: Path) -> bool:
    """Whether it has a config.json and is no checkpoint or run directory of ours."""
    ours = (path / "integrity.json").is_file() or (path / "checkpoints").is_dir()
    return (path / "config.json").is_file() and not ours


def groups_of(path: Path) -> dict[str, Any]:
    """What a config.yaml would say of its model. Raises UserError."""
    return {"model": dataclasses.asdict(from_hf_config(path / "config.json").model)}


def place_of_import(path: Path, run_dir: Path) -> Path:
    """Where a run keeps what it imported from `path`."""
    return run_dir / f"imported-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def import_once(path: Path, run_dir: Path, is_chief: bool) -> Path:
    """Import into the run directory, one rank for all; what is there already is taken. Raises UserError."""
    from megatron_ettin.convert.from_hf import from_hf

    target = place_of_import(path, run_dir)
    if is_chief and not target.is_dir():
        run_dir.mkdir(parents=True, exist_ok=True)
        from_hf(path, target)
    end = time.monotonic() + WAIT_SECONDS
    while not target.is_dir():  # it gets its name when it is whole
        if time.monotonic() > end:
            raise RankError(f"--init-from {path}: was not imported by rank 0 within {WAIT_SECONDS:,.0f} s")
        time.sleep(0.2)
    return target


@contextlib.contextmanager
def as_checkpoint(path: Path) -> Iterator[Path]:
    """The checkpoint of a checkpoint, a run directory or a Hugging Face folder, which is imported for so long."""
    from megatron_ettin.checkpoint.directory import resolve
    from megatron_ettin.convert.from_hf import from_hf

    if not is_hf_folder(path):
        yield resolve(path)
        return
    with tempfile.TemporaryDirectory(prefix="ettin-") as room:
        from_hf(path, Path(room) / "imported")
        yield Path(room) / "imported"
