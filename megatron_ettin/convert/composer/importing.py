"""Import the original trainer's checkpoint file as a weights-only checkpoint for training, evaluation and export.

One tensor is in memory at a time. The file's optimizer state is never read. The tokenizer that Composer records in the
file is imported too.

The number of heads, the rotary bases and the windows do not follow from the tensors' shapes. They come from --config,
else from the configuration that Composer recorded in the file, else from the published size with these shapes.
Assumptions are noted; contradictions between the tensors and the configuration raise UserError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.original.model import CLASSES, MODEL_NAMES, TrainerModel, read_trainer_model
from megatron_ettin.config.overrides import read_yaml
from megatron_ettin.config.recipe import PHASES
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import SIZES
from megatron_ettin.convert.composer.safe_unpickler import TorchFile
from megatron_ettin.convert.composer.weights import BIAS, EMBEDDING, TrainerWeights, find_weights, lookup
from megatron_ettin.convert.hf_config import MODEL_TYPES, from_hf_config
from megatron_ettin.convert.importing import ModelImport, Report
from megatron_ettin.convert.rules import weight_mappings
from megatron_ettin.convert.source import check_objective
from megatron_ettin.convert.tokenizer_files import FILES, import_tokenizer, token_count

FRESH = "only weights are read: training from them starts with a fresh optimizer"
NO_BIAS = "the file has no decoder.bias: zeros are stored, which is the same model"
NO_TOKENIZER = "the file records no tokenizer.json: the checkpoint has no tokenizer"
ASSUMED_PHASE = "decay"
"""Phase whose rotary bases and row length are assumed: weights without a record are most often a finished model."""
OBJECTIVE_OF_HEAD = {"head": "mlm", "lm_head": "clm"}
"""Prefix of the prediction head's tensors -> objective."""
MNTP = (
    "a decoder that was trained on as an encoder predicts token i at position i - 1 (masked next-token prediction):"
    " train it on as an encoder before a masked token is read at its own position"
)


def from_composer(
    file: Path, out: Path, config: Path | None = None, report: Report | None = None, objective: str | None = None
) -> dict[str, Any]:
    """Import `file` into the new checkpoint folder `out`.

    Args:
        file: a file of torch.save.
        out: the checkpoint's folder.
        config: the run's YAML, or a config.json; None: the file's own record, else the published size.
        report: called with (tensors done, tensors in all).
        objective: mlm or clm, to import the weights for another objective; None: the objective of the file.

    Returns:
        Summary with the keys source, out, objective, size, tensors and notes (the assumptions made).

    Raises:
        UserError: the file is no checkpoint of the original trainer or contradicts `config`, or `out` is not free.
    """
    file, out = Path(file), Path(out)
    if objective is not None:
        check_objective(objective)
    with contextlib.closing(TorchFile(file)) as source:
        weights = find_weights(source)
        described = resolve_model(weights, config, objective)
        assert described.objective is not None
        notes = [*described.notes, *([] if BIAS in weights.tensors else [NO_BIAS]), FRESH]
        mappings = list(weight_mappings(described.model, weights.naming))
        model = ModelImport(weights, described.model, described.objective, mappings, notes)
        model.check(described.source, optional=(BIAS,))
        return model.write(out, lambda target: _import_tokenizer(source.tree, target, file), NO_TOKENIZER, report)


def _import_tokenizer(tree: Any, target: Path, file: Path) -> int | None:
    """Write the recorded tokenizer to the folder `target`.

    Returns:
        The number of its ids; None if the file records no tokenizer.
    """
    recorded = lookup(tree, "state", "integrations", "huggingface", "tokenizer")
    contents = {name: lookup(recorded, name, "content") for name in FILES}
    if not isinstance(contents[FILES[0]], dict):
        return None
    folder = target.with_name(".recorded")
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
        import_tokenizer(folder, target)
        return token_count(target)
    except UserError:
        raise UserError(f"{file}: the recorded {FILES[0]} is no tokenizer that `tokenizers` can read") from None
    finally:
        shutil.rmtree(folder)


def resolve_model(weights: TrainerWeights, config: Path | None, objective: str | None) -> TrainerModel:
    """Return the model's configuration and objective.

    Args:
        weights: weights of the file.
        config: path given with --config; None without it.
        objective: value of --objective; None without it.

    Raises:
        UserError: no source gives the configuration, or it contradicts the tensors.
    """
    tree, path = weights.file.tree, weights.path
    recorded = _from_record(tree, path)
    described = _from_config(config) if config is not None else recorded or _from_shapes(weights)
    layers = weights.num_layers
    if layers != described.model.num_layers:
        raise UserError(f"{path}: has {layers} layers, but {described.source} asks for {described.model.num_layers}")
    notes = list(described.notes)
    if config is not None and recorded is not None:
        notes += _differences(described, recorded)
    objective = _resolve_objective(described, weights, objective, notes)
    # the original trainer's decoder sees the keys to the left of its encoder's window, and the query itself
    left = described.model.encoder_window
    model = dataclasses.replace(described.model, decoder_window_keys=left + 1)
    if objective == "clm":
        notes.append(f"decoder_window_keys is {left + 1}: the original trainer's window is {left} keys and the query's")
    return dataclasses.replace(described, objective=objective, model=model, notes=[*notes, *_history(tree)])


def _from_config(path: Path) -> TrainerModel:
    """Read --config: a YAML of the original trainer, its `model_config` alone, or a config.json of `transformers`."""
    content = read_yaml(path)
    if _is_hf(content):
        parsed = from_hf_config(path)
        _, head = MODEL_NAMES["flex_bert" if parsed.objective == "mlm" else "flex_gpt"]
        return TrainerModel(str(path), parsed.objective, head, parsed.model, list(parsed.notes))
    config = lookup(content, "model", "model_config") or content.get("model_config") or content
    if not isinstance(config, dict) or "num_hidden_layers" not in config:
        raise UserError(f"{path}: has no model.model_config with num_hidden_layers, and is no config.json either")
    return read_trainer_model(config, lookup(content, "model", "name"), str(path), content.get("max_seq_len"))


def _from_record(tree: Any, path: Path) -> TrainerModel | None:
    """Return the model configuration that Composer recorded in the file; None if it recorded none."""
    entry = lookup(tree, "state", "integrations", "huggingface", "model", "config")
    config, name = lookup(entry, "content"), lookup(entry, "class")
    if not isinstance(config, dict) or "num_hidden_layers" not in config:
        return None
    if _is_hf(config):
        raise UserError(f"{path}: records a model of transformers' own class; give its config.json with --config")
    return read_trainer_model(
        config, name.rpartition(".")[2] if isinstance(name, str) else None, f"{path} (recorded)", None
    )


def _is_hf(content: dict[str, Any]) -> bool:
    """Return whether `content` is a config.json of transformers' ModernBert classes rather than the trainer's."""
    return "num_hidden_layers" in content and content.get("model_type") in MODEL_TYPES.values()


def _from_shapes(weights: TrainerWeights) -> TrainerModel:
    """Return the published size with the tensors' shapes, and the rotary bases of ASSUMED_PHASE. Raises UserError."""
    layers, path = weights.num_layers, weights.path
    embedding, inner = weights.tensors.get(EMBEDDING), weights.tensors.get("model.layers.0.mlp.Wo.weight")
    if embedding is None or inner is None or len(embedding.shape) != 2 or len(inner.shape) != 2:
        raise UserError(f"{path}: has no embeddings.tok_embeddings.weight or no layers.0.mlp.Wo.weight")
    (vocabulary, hidden), ffn = embedding.shape, inner.shape[1]
    sizes = {(shape.num_layers, shape.hidden_size, shape.ffn_hidden_size): size for size, shape in SIZES.items()}
    size = sizes.get((layers, hidden, ffn))
    if size is None:
        raise UserError(
            f"{path}: {layers} layers, hidden size {hidden}, intermediate size {ffn} is no published size, and the file"
            " records no configuration; give --config"
        )
    shape, phase = SIZES[size], PHASES[ASSUMED_PHASE]
    theta, local, rows = phase.global_rope_theta, phase.local_rope_theta[size], phase.padded.seq_len
    note = (
        f"the file records no configuration: assumed size {size} ({shape.num_attention_heads} heads, one global layer"
        f" in 3, windows of 128, norm_eps 1e-5) with the rotary bases of phase {ASSUMED_PHASE} (global {theta:g}, local"
        f" {local:g}) and rows of {rows:,}; if that is wrong, import again with --config"
    )
    model = ModelConfig(
        **dataclasses.asdict(shape),
        global_rope_theta=theta,
        local_rope_theta=local,
        max_position_embeddings=rows,
        vocab_size=vocabulary,
    )
    return TrainerModel(f"the shape of {size}", None, None, model, [note])


def _resolve_objective(
    described: TrainerModel, weights: TrainerWeights, requested: str | None, notes: list[str]
) -> str:
    """Return the objective to import the weights with, and add notes for the user to `notes`. Raises UserError."""
    head = weights.head
    trained = described.objective or OBJECTIVE_OF_HEAD[head]
    if requested is None and described.head not in (None, head):
        raise UserError(
            f"{weights.path}: has {head}.*, but {described.source} is {described.objective}, whose head is"
            f" {described.head}.*; give the configuration of this run, or --objective mlm|clm"
        )
    if requested is None and described.objective is None:
        other = {"mlm": "clm", "clm": "mlm"}[trained]
        notes.append(f"objective {trained}: from the name {head}.*, which a model cross-trained to {other} would keep")
    if (trained, head) == CLASSES["flex_gpt_to_bert"] and described.objective is not None:
        notes.append(MNTP)
    if requested is not None and requested != trained:
        notes.append(f"trained as {trained}, imported as {requested}: train it on before it is used as one")
    return requested or trained


def _differences(described: TrainerModel, recorded: TrainerModel) -> list[str]:
    """Return a note for each model key that --config and the file's record set differently; --config is followed."""
    ours, theirs = dataclasses.asdict(described.model), dataclasses.asdict(recorded.model)
    return [
        f"{described.source} gives {key} {value!r}, the file records {theirs[key]!r}: the first is used"
        for key, value in ours.items()
        if value != theirs[key] and key not in ("max_position_embeddings", "decoder_window_keys")
    ]


def _history(tree: Any) -> list[str]:
    """Return a note of the batches, samples and tokens trained, if the file records them; else an empty list."""
    time = lookup(tree, "state", "timestamp")
    time = lookup(time, "Timestamp") or time
    counts = {key: lookup(time, key) for key in ("batch", "sample", "token")}
    shown = [f"{key} {value:,}" for key, value in counts.items() if type(value) is int]
    name = lookup(tree, "state", "run_name")
    run = f" of run {name[:80]!a}" if isinstance(name, str) else ""
    return [f"the file was written at {', '.join(shown)}{run}; the checkpoint counts from 0"] if shown else []
