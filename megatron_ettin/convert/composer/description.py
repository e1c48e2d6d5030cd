"""What a file's weights are: their model, their objective, and where each of that is known from.

The shape of the tensors says everything but heads, rotary bases and windows. Those come from --config, else from what
the file records, else from the published size that has this shape; what was assumed is told, what disagrees refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.phases import PHASES
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.sizes import SIZES
from megatron_ettin.convert.composer.names import Weights, at
from megatron_ettin.convert.composer.trainer_config import KINDS, Described, from_file, recorded

ASSUMED_PHASE = "decay"  # the last one: weights without a record of their training are most often a finished model
OWNER = {"head": "mlm", "lm_head": "clm"}
MNTP = (
    "a decoder that was trained on as an encoder predicts token i at position i - 1 (masked next-token prediction):"
    " train it on as an encoder before a masked token is read at its own position"
)


@dataclasses.dataclass(frozen=True)
class Decision:
    """`source` is what the model is known from, for messages."""

    source: str
    objective: str
    model: ModelConfig
    notes: list[str]


def decide(tree: Any, weights: Weights, file: Path, config: Path | None, asked: str | None) -> Decision:
    """Raises UserError where nothing says what the model is, or two things say different things."""
    if weights.head is None:
        raise UserError(f"{file}: has no head.* or lm_head.*; a model without its prediction head is incomplete")
    written = recorded(tree, file)
    described = from_file(config) if config is not None else written or by_shape(weights, file)
    layers = layer_count(weights)
    if layers != described.model.num_layers:
        raise UserError(f"{file}: has {layers} layers, but {described.source} asks for {described.model.num_layers}")
    notes = list(described.notes)
    if config is not None and written is not None:
        notes += _differences(described, written)
    objective = _objective(described, weights.head, file, asked, notes)
    # the original trainer's causal window is the left half of its encoder's, and the query itself
    before = described.model.encoder_window
    model = dataclasses.replace(described.model, decoder_window_keys=before + 1)
    if objective == "clm":
        notes.append(
            f"decoder_window_keys is {before + 1}: the original trainer's window is {before} keys and the query's"
        )
    return Decision(described.source, objective, model, [*notes, *_history(tree)])


def layer_count(weights: Weights) -> int:
    return len({name.split(".")[2] for name in weights.tensors if name.startswith("model.layers.")})


def by_shape(weights: Weights, file: Path) -> Described:
    """The published size with the tensors' shape. Its rotary bases are those of the last phase."""
    layers = layer_count(weights)
    embedding = weights.tensors.get("model.embeddings.tok_embeddings.weight")
    inner = weights.tensors.get("model.layers.0.mlp.Wo.weight")
    if embedding is None or inner is None or len(embedding.shape) != 2 or len(inner.shape) != 2:
        raise UserError(f"{file}: has no embeddings.tok_embeddings.weight or no layers.0.mlp.Wo.weight")
    (vocabulary, hidden), ffn = embedding.shape, inner.shape[1]
    found = (layers, hidden, ffn)
    sizes = [s for s, of in SIZES.items() if (of.num_layers, of.hidden_size, of.ffn_hidden_size) == found]
    if not sizes:
        words = f"{layers} layers, hidden size {hidden}, intermediate size {ffn}"
        raise UserError(f"{file}: {words} is no published size, and the file records no configuration; give --config")
    size, shape, phase = sizes[0], SIZES[sizes[0]], PHASES[ASSUMED_PHASE]
    theta, local = phase.global_rope_theta, phase.local_rope_theta[size]
    rows = phase.padded.seq_len
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
    return Described(f"the shape of {size}", None, None, model, [note])


def _objective(described: Described, head: str, file: Path, asked: str | None, notes: list[str]) -> str:
    """What the weights become; `notes` gets what a reader must know of it."""
    trained = described.objective or OWNER[head]
    if asked is None and described.head not in (None, head):
        raise UserError(
            f"{file}: has {head}.*, but {described.source} is {described.objective}, whose head is {described.head}.*;"
            " give the configuration of this run, or --objective mlm|clm"
        )
    if asked is None and described.objective is None:
        other = {"mlm": "clm", "clm": "mlm"}[trained]
        notes.append(f"objective {trained}: from the name {head}.*, which a model cross-trained to {other} would keep")
    if (trained, head) == KINDS["flex_gpt_to_bert"] and described.objective is not None:
        notes.append(MNTP)
    if asked is not None and asked != trained:
        notes.append(f"trained as {trained}, imported as {asked}: train it on before it is used as one")
    return asked or trained


def _differences(described: Described, written: Described) -> list[str]:
    """Where --config contradicts the file's own record and is followed."""
    ours, theirs = dataclasses.asdict(described.model), dataclasses.asdict(written.model)
    passed_over = ("max_position_embeddings", "decoder_window_keys")
    return [
        f"{described.source} gives {key} {value!r}, the file records {theirs[key]!r}: the first is used"
        for key, value in ours.items()
        if value != theirs[key] and key not in passed_over
    ]


def _history(tree: Any) -> list[str]:
    """How far the file's run had come, where it says so."""
    time = at(tree, "state", "timestamp")
    time = at(time, "Timestamp") or time
    counts = {key: at(time, key) for key in ("batch", "sample", "token")}
    said = [f"{key} {value:,}" for key, value in counts.items() if type(value) is int]
    name = at(tree, "state", "run_name")
    run = f" of run {name[:80]!a}" if isinstance(name, str) else ""
    return [f"the file was written at {', '.join(said)}{run}; the checkpoint counts from 0"] if said else []
