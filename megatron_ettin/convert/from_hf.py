"""Import a Hugging Face folder as a weights-only checkpoint, for `convert from-hf`, `--init-from` and `eval`.

Such a folder has no optimizer state, so training from it starts a fresh optimizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import RankError, UserError
from megatron_ettin.checkpoint.directory import resolve
from megatron_ettin.convert.hf_config import from_hf_config
from megatron_ettin.convert.importing import ModelImport, Report
from megatron_ettin.convert.rules import weight_mappings
from megatron_ettin.convert.safetensors_file import ModelFiles
from megatron_ettin.convert.source import check_objective
from megatron_ettin.convert.tokenizer_files import import_tokenizer, token_count

FRESH = "the folder holds weights only: training from it starts with a fresh optimizer"
NO_TOKENIZER = "the folder has no tokenizer.json: the checkpoint has no tokenizer"
WAIT_SECONDS = 3_600.0
"""Longest time that other processes wait for the main process's import."""


def from_hf(hf_dir: Path, out: Path, report: Report | None = None, objective: str | None = None) -> dict[str, Any]:
    """Import `hf_dir` into the new checkpoint folder `out`.

    Args:
        hf_dir: a folder with config.json and safetensors files.
        out: the checkpoint's folder.
        report: called with (tensors done, tensors in all).
        objective: mlm or clm, to import a decoder's folder as an encoder or the reverse; None: as it was trained.

    Returns:
        Summary with the keys source, out, objective, size, tensors and notes (the assumptions made).

    Raises:
        UserError: the folder holds no ModernBERT model that this package supports, or `out` is not free.
    """
    hf_dir = Path(hf_dir)
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such folder; give a folder with config.json and safetensors files")
    parsed = from_hf_config(hf_dir / "config.json")
    objective = check_objective(objective or parsed.objective)
    notes = [*parsed.notes, FRESH]
    if objective != parsed.objective:
        notes.append(f"trained as {parsed.objective}, imported as {objective}: train it on before it is used as one")
    mappings = list(weight_mappings(parsed.model, parsed.objective))
    progress = {"special_ids": parsed.special_ids}
    model = ModelImport(ModelFiles(hf_dir), parsed.model, objective, mappings, notes, progress)
    model.check("config.json")

    def tokenizer(target: Path) -> int | None:
        return token_count(target) if import_tokenizer(hf_dir, target) else None

    return model.write(out, tokenizer, NO_TOKENIZER, report)


def is_hf_folder(path: Path) -> bool:
    """Return whether `path` has a config.json and is neither a checkpoint nor a run directory of this package."""
    ours = (path / "integrity.json").is_file() or (path / "checkpoints").is_dir()
    return (path / "config.json").is_file() and not ours


def model_group(path: Path) -> dict[str, Any]:
    """Return the `model` group that a config.yaml would have for this Hugging Face folder. Raises UserError."""
    return {"model": dataclasses.asdict(from_hf_config(path / "config.json").model)}


def import_once(path: Path, run_dir: Path, is_main_process: bool) -> Path:
    """Import a Hugging Face folder into the run directory, unless an earlier import is there.

    The main process imports; the others wait until the folder exists.

    Returns:
        The checkpoint's folder, `RUN_DIR/imported-HASH` with a hash of `path`.

    Raises:
        RankError: the main process has not finished within WAIT_SECONDS.
        UserError: on the main process, as `from_hf`.
    """
    target = run_dir / f"imported-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if is_main_process and not target.is_dir():
        run_dir.mkdir(parents=True, exist_ok=True)
        from_hf(path, target)
    end = time.monotonic() + WAIT_SECONDS
    # the folder gets its name when it is complete
    while not target.is_dir():
        if time.monotonic() > end:
            raise RankError(f"--init-from {path}: was not imported by rank 0 within {WAIT_SECONDS:,.0f} s")
        time.sleep(0.2)
    return target


@contextlib.contextmanager
def as_checkpoint(path: Path) -> Iterator[Path]:
    """Yield the checkpoint folder for a checkpoint, a run directory (its latest) or a Hugging Face folder.

    A Hugging Face folder is imported into a temporary folder, which is removed at the end.
    """
    if not is_hf_folder(path):
        yield resolve(path)
        return
    with tempfile.TemporaryDirectory(prefix="ettin-") as folder:
        from_hf(path, Path(folder) / "imported")
        yield Path(folder) / "imported"
