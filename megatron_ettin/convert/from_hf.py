"""A Hugging Face folder -> a weights-only checkpoint that training, evaluation and export read like any other.

Weights are stored in float32 whatever they came in: widening is exact, and training starts from float32. There is no
optimizer state in such a folder, so training from it starts a fresh one.

Hugging Face folders where a checkpoint is asked for: `--init-from`, `ettin eval`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.errors import RankError, UserError
from megatron_ettin.checkpoint.directory import seal_and_rename
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import Config, ModelConfig
from megatron_ettin.config.tables import SIZES
from megatron_ettin.convert.folders import resolved, staged
from megatron_ettin.convert.hf_config import from_hf_config
from megatron_ettin.convert.rules import TIED, Pair, pairs
from megatron_ettin.convert.safetensors_file import NAMES, ModelFiles, read_ahead
from megatron_ettin.convert.source import check_objective
from megatron_ettin.convert.tokenizer_files import import_tokenizer, token_count

FRESH = "the folder holds weights only: training from it starts with a fresh optimizer"


def from_hf(
    hf_dir: Path, out: Path, report: Callable[[int, int], None] | None = None, objective: str | None = None
) -> dict[str, Any]:
    """Import `hf_dir` into the new checkpoint folder `out`. Returns what was read and what had to be assumed.

    `objective` makes an encoder of a decoder's folder or the reverse: the weights are the same."""
    hf_dir = Path(hf_dir)
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such folder; give a folder with config.json and safetensors files")
    parsed = from_hf_config(hf_dir / "config.json")
    objective = check_objective(objective or parsed.objective)
    wanted = list(pairs(parsed.model, parsed.objective))
    notes = [*parsed.notes, FRESH]
    if objective != parsed.objective:
        notes.append(f"trained as {parsed.objective}, imported as {objective}: train it on before it is used as one")
    files = ModelFiles(hf_dir)
    with staged(out) as staging:
        _check(files, wanted, hf_dir)
        if import_tokenizer(hf_dir, staging / "tokenizer"):
            _check_tokenizer(staging / "tokenizer", parsed.model, hf_dir)
        else:
            notes.append("the folder has no tokenizer.json: the checkpoint has no tokenizer")
        progress = {"step": 0, "tokens": 0, "special_ids": parsed.special_ids}
        known = write_weights(staging, _tensors(files, wanted, parsed.model, report), {"progress": progress})
        (staging / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        config = imported_config(parsed.model, objective)
        (staging / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        seal_and_rename(staging, resolved(out), known)
    return {
        **{"source": str(hf_dir), "out": str(out), "objective": objective, "size": size_of(parsed.model)},
        **{"tensors": len(wanted), "notes": notes},
    }


def size_of(model: ModelConfig) -> str | None:
    """The published size with this shape, if any."""
    for name, shape in SIZES.items():
        if all(getattr(model, key) == value for key, value in dataclasses.asdict(shape).items()):
            return name
    return None


def imported_config(model: ModelConfig, objective: str) -> Config:
    """A complete config.yaml, as every checkpoint has one: the folder's model, phase `imported`, and the size's recipe
    (the smallest one's for an unpublished shape) for what a folder of weights cannot say."""
    size = size_of(model)
    base = recipe(size or "17m", objective, "pretrain")
    names = {"run.size": size or "custom", "run.phase": "imported", "run.tokens": 0}
    imported = base.with_keys({**names, "data.seq_len": model.max_position_embeddings})
    return dataclasses.replace(imported, model=model)


def _check(files: ModelFiles, wanted: list[Pair], hf_dir: Path) -> None:
    """Exactly the tensors that the rules know, in their shapes; the tied output, if stored, equal to the embedding."""
    names = set(files.tensors)
    expected = {name: pair for pair in wanted for name in pair.theirs}
    unknown = sorted(names - set(expected) - {TIED})
    if unknown:
        raise UserError(f"{hf_dir}: holds {unknown[0]}, which this architecture does not have")
    for name, pair in expected.items():
        if name not in names:
            raise UserError(f"{hf_dir}: lacks {name}; the model would be incomplete")
        stored = files.tensors[name]
        if stored.shape != pair.their_shape:
            what = "the vocabulary of config.json" if pair.form.may_be_padded else "config.json"
            raise UserError(f"{hf_dir}: {name} is {stored.shape}, but {what} asks for {pair.their_shape}")
        if stored.dtype not in NAMES.values():
            raise UserError(f"{hf_dir}: {name} is {stored.dtype}; allowed: {', '.join(NAMES.values())}")
    if TIED in names and not torch.equal(files.read(TIED), files.read(wanted[0].theirs[0])):
        raise UserError(f"{hf_dir}: {TIED} differs from the embedding; our output weight is tied to it")


def _check_tokenizer(tokenizer: Path, model: ModelConfig, hf_dir: Path) -> None:
    tokens = token_count(tokenizer)
    if tokens > model.vocab_size:
        raise UserError(f"{hf_dir}: the tokenizer has {tokens:,} ids, the model's vocabulary {model.vocab_size:,} rows")


def _tensors(
    files: ModelFiles, wanted: list[Pair], model: ModelConfig, report: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    def read(pair: Pair) -> torch.Tensor:
        return pair.form.merge([files.read(name).to(torch.float32) for name in pair.theirs], model)

    pieces = read_ahead(wanted, lambda pair: 4 * math.prod(pair.shape), read)
    for done, (pair, tensor) in enumerate(pieces, start=1):
        yield pair.ours, tensor
        if report is not None:
            report(done, len(wanted))


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


def import_once(path: Path, run_dir: Path, is_main_process: bool) -> Path:
    """Import into the run directory, one rank for all; what is there already is taken. Raises UserError."""

    target = place_of_import(path, run_dir)
    if is_main_process and not target.is_dir():
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

    if not is_hf_folder(path):
        yield resolve(path)
        return
    with tempfile.TemporaryDirectory(prefix="ettin-") as room:
        from_hf(path, Path(room) / "imported")
        yield Path(room) / "imported"
