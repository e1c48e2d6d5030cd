"""The original trainer's checkpoint file -> a weights-only checkpoint that training, evaluation and export read.

Weights are stored in float32, one tensor in memory at a time; the file's optimizer state is never touched.

The tokenizer that Composer records in a checkpoint file, file by file, as the checkpoint's tokenizer/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.digests import Entry
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import seal_and_rename
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.convert.composer.description import Decision, Weights, at, decide, find_weights
from megatron_ettin.convert.composer.torch_file import DTYPES, TorchFile
from megatron_ettin.convert.folders import resolved, staged
from megatron_ettin.convert.from_hf import imported_config, size_of
from megatron_ettin.convert.rules import TIED, Pair, pairs
from megatron_ettin.convert.source import check_objective
from megatron_ettin.convert.tokenizer_files import FILES, import_tokenizer, token_count

BIAS = "decoder.bias"
FRESH = "only weights are read: training from them starts with a fresh optimizer"
Report = Callable[[int, int], None]


def from_composer(
    file: Path, out: Path, config: Path | None = None, report: Report | None = None, objective: str | None = None
) -> dict[str, Any]:
    """Import `file` into the new checkpoint folder `out`. Returns what was read and what had to be assumed.

    `config` is the run's YAML, or a config.json; without it the file's own record is used, else the published size."""
    file, out = Path(file), Path(out)
    if objective is not None:
        check_objective(objective)
    source = TorchFile(file)
    try:
        weights = find_weights(source.tree, file)
        decision = decide(source.tree, weights, file, config, objective)
        wanted = list(pairs(decision.model, weights.form))
        notes = [*decision.notes, *_check(source, weights, wanted, decision), FRESH]
        with staged(out) as staging:
            notes += write_tokenizer(source.tree, staging, decision.model, file)
            known = _write(staging, _tensors(source, weights, wanted, decision.model, report), decision)
            seal_and_rename(staging, resolved(out), known)
    finally:
        source.close()
    return {
        **{"source": str(file), "out": str(out), "objective": decision.objective, "size": size_of(decision.model)},
        **{"tensors": len(wanted), "notes": notes},
    }


def _write(staging: Path, tensors: Iterator[tuple[str, torch.Tensor]], decision: Decision) -> dict[str, Entry]:
    progress = {"step": 0, "tokens": 0}
    known = write_weights(staging, tensors, {"progress": progress})
    (staging / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
    config = imported_config(decision.model, decision.objective)
    (staging / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return known


def _check(source: TorchFile, weights: Weights, wanted: list[Pair], decision: Decision) -> list[str]:
    """Exactly the tensors that the rules know, in their shapes; the output, if stored, equal to the embedding."""
    file, held = source.path, weights.tensors
    expected = {name: pair for pair in wanted for name in pair.theirs}
    for name in held:
        if name not in expected and name != TIED:
            raise UserError(f"{file}: holds {weights.original[name]!r}, which our model does not have")
    for name, pair in expected.items():
        if name == BIAS and name not in held:
            continue
        if name not in held:
            raise UserError(f"{file}: lacks {name}, which {decision.source} asks for")
        found, called = held[name], weights.original[name]
        if found.shape != pair.their_shape:
            raise UserError(f"{file}: {called!r} is {found.shape}; {decision.source} asks for {pair.their_shape}")
        if found.storage.kind not in DTYPES:
            raise UserError(f"{file}: {called!r} is in {found.storage.kind!r}; allowed: {', '.join(DTYPES)}")
    embedding = held[wanted[0].theirs[0]]
    if TIED in held and held[TIED] != embedding:
        _check_tied(source, weights, embedding.shape)
    return [] if BIAS in held else ["the file has no decoder.bias: zeros are stored, which is the same model"]


def _check_tied(source: TorchFile, weights: Weights, shape: tuple[int, ...]) -> None:
    """An output weight of its own storage must still hold the embedding's values."""
    output = weights.tensors[TIED]
    called = weights.original[TIED]
    if output.shape != shape or output.storage.kind not in DTYPES:
        raise UserError(f"{source.path}: {called!r} is {output.shape}, the embedding {shape}; our output is tied to it")
    if not torch.equal(source.read(output), source.read(weights.tensors["model.embeddings.tok_embeddings.weight"])):
        raise UserError(f"{source.path}: {called!r} differs from the embedding; our output weight is tied to it")


def _tensors(
    source: TorchFile, weights: Weights, wanted: list[Pair], model: ModelConfig, report: Report | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for done, pair in enumerate(wanted, start=1):
        parts = [_read(source, weights, name, pair).to(torch.float32) for name in pair.theirs]
        yield pair.ours, pair.form.merge(parts, model)
        if report is not None:
            report(done, len(wanted))


def _read(source: TorchFile, weights: Weights, name: str, pair: Pair) -> torch.Tensor:
    found = weights.tensors.get(name)
    return torch.zeros(pair.their_shape) if found is None else source.read(found)


NONE = "the file records no tokenizer.json: the checkpoint has no tokenizer"


def write_tokenizer(tree: Any, staging: Path, model: ModelConfig, file: Path) -> list[str]:
    """Write `staging`/tokenizer where the file has one. Returns what a reader must know."""
    recorded = at(tree, "state", "integrations", "huggingface", "tokenizer")
    contents = {name: at(recorded, name, "content") for name in FILES}
    if not isinstance(contents[FILES[0]], dict):
        return [NONE]
    folder = staging / ".recorded"
    folder.mkdir()
    for name, content in contents.items():
        if not isinstance(content, dict):
            continue
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        except (TypeError, ValueError, RecursionError):
            raise UserError(f"{file}: the recorded {name} is not plain JSON") from None
    try:
        import_tokenizer(folder, staging / "tokenizer")
        tokens = token_count(staging / "tokenizer")
    except UserError:
        raise UserError(f"{file}: the recorded {FILES[0]} is no tokenizer that `tokenizers` can read") from None
    finally:
        shutil.rmtree(folder)
    if tokens > model.vocab_size:
        raise UserError(f"{file}: the tokenizer has {tokens:,} ids, the model's vocabulary {model.vocab_size:,} rows")
    return []
