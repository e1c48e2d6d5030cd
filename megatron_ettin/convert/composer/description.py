"""What a file's weights are: their model, their objective, and where each of that is known from.

The shape of the tensors says everything but heads, rotary bases and windows. Those come from --config, else from what
the file records, else from the published size that has this shape; what was assumed is told, what disagrees refused.

Where a trainer's file keeps its weights, and what they are called in `transformers`.

The original trainer wraps a model several times over; each wrapper puts a word before or into the names. Taken off, the
rest are the encoder's names of convert/rules.py, for its decoders keep the fused attention input too. A file whose
q, k and v are apart gets the decoder's names, which have them apart.

The original trainer's words for a model (`model_config` of its YAML, or what it recorded in the file) in ours.

A key that is missing has the trainer's own default, and every default that was used is told. What the names of the
tensors cannot show (activation, kind of attention, order of rotary channels) is checked here, the rest by the names."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.original.model import DEFAULTS, KINDS, check_fixed, default_note, model_of
from megatron_ettin.config.overrides import read_yaml
from megatron_ettin.config.recipe import PHASES
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.config.tables import SIZES
from megatron_ettin.convert.composer.torch_file import TensorRecord
from megatron_ettin.convert.hf_config import MODEL_TYPES, from_hf_config

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


PLACES = (("state", "model"), ("model",), ("state_dict",), ("model_state_dict",), ())
HEADS = ("head", "lm_head")
RENAMES = (
    (r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),  # torch.compile, FSDP
    (r"^(?:(?:module|model|bert)\.)+", ""),  # DDP, Composer, the trainer's class
    (r"^encoder\.layers\.", "layers."),
    (r"^(?=(?:embeddings|layers|final_norm)\.)", "model."),
)


@dataclass(frozen=True)
class Weights:
    """Tensors by the names of `transformers`; `original` has what the file calls them."""

    tensors: dict[str, TensorRecord]
    original: dict[str, str]
    head: str | None  # `head` or `lm_head`, as the file has it
    form: str  # whose names these are, for rules.pairs


def at(tree: Any, *keys: str) -> Any:
    """What a tree of dictionaries holds there, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def find_weights(tree: Any, path: Path) -> Weights:
    """The model's state dict. Raises UserError where there is none or a name has no place in our model."""
    for place in PLACES:
        found = at(tree, *place)
        if isinstance(found, dict) and any(isinstance(value, TensorRecord) for value in found.values()):
            return _renamed(found, path)
    places = ", ".join("/".join(place) for place in PLACES if place)
    raise UserError(f"{path}: no weights found; looked for tensors at {places} and at the top")


def _renamed(found: dict[Any, Any], path: Path) -> Weights:
    bare: dict[str, str] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, TensorRecord):
            raise UserError(f"{path}: {name!r} is no plain tensor; a sharded or quantized file is not read")
        short = name
        for pattern, replacement in RENAMES:
            short = re.sub(pattern, replacement, short)
        if short in bare:
            raise UserError(f"{path}: {bare[short]!r} and {name!r} are the same tensor of our model")
        bare[short] = name
    heads = [head for head in HEADS if any(name.startswith(f"{head}.") for name in bare)]
    if len(heads) == 2:
        raise UserError(f"{path}: has both head.* (an encoder's) and lm_head.* (a decoder's)")
    form = "clm" if any(name.endswith(".attn.q_proj.weight") for name in bare) else "mlm"
    wanted = HEADS[form == "clm"]
    original = {re.sub(r"^(?:lm_)?head\.", f"{wanted}.", short): name for short, name in bare.items()}
    tensors = {short: found[name] for short, name in original.items()}
    return Weights(tensors, original, heads[0] if heads else None, form)


@dataclass(frozen=True)
class Described:
    """A model by its trainer's configuration. `head` is what its weights should be called."""

    source: str
    objective: str | None
    head: str | None
    model: ModelConfig
    notes: list[str] = field(default_factory=list)


def from_file(path: Path) -> Described:
    """Of --config: a YAML of the original trainer, its `model_config` alone, or a config.json of `transformers`."""
    content = read_yaml(path)
    if _is_hf(content):
        parsed = from_hf_config(path)
        head = {"mlm": "head", "clm": "lm_head"}[parsed.objective]
        return Described(str(path), parsed.objective, head, parsed.model, list(parsed.notes))
    group = content.get("model")
    name = group.get("name") if isinstance(group, dict) else None
    found = at(content, "model", "model_config") or content.get("model_config") or content
    if not isinstance(found, dict) or "num_hidden_layers" not in found:
        raise UserError(f"{path}: has no model.model_config with num_hidden_layers, and is no config.json either")
    return _described(found, name, str(path), content.get("max_seq_len"))


def recorded(tree: Any, path: Path) -> Described | None:
    """What Composer wrote into the file about its model, if it did."""
    entry = at(tree, "state", "integrations", "huggingface", "model", "config")
    content = at(entry, "content")
    if not isinstance(content, dict) or "num_hidden_layers" not in content:
        return None
    if _is_hf(content):
        raise UserError(f"{path}: records a model of transformers' own class; give its config.json with --config")
    name = at(entry, "class")
    return _described(content, name.rpartition(".")[2] if isinstance(name, str) else None, f"{path} (recorded)", None)


def _is_hf(content: dict[str, Any]) -> bool:
    """Whether this is a config.json of transformers' ModernBert classes rather than the trainer's."""
    return "num_hidden_layers" in content and content.get("model_type") in MODEL_TYPES.values()


def _described(config: dict[str, Any], name: Any, source: str, seq_len: Any) -> Described:
    notes = [
        f"{source} has no {key}: {default_note(key, value)}"
        for key, value in DEFAULTS.items()
        if key not in config and (key != "init_std" or "initializer_range" not in config)
    ]
    try:
        check_fixed(config, source)
        model = model_of({**DEFAULTS, **config}, source, seq_len, notes)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: {error}") from None
    objective, head = KINDS.get(name, (None, None)) if isinstance(name, str) else (None, None)
    causal = config.get("causal_mask")
    if objective is None and isinstance(causal, bool):
        objective, head = ("clm", "lm_head") if causal else ("mlm", "head")
    elif isinstance(causal, bool) and causal != (objective == "clm"):
        raise UserError(f"{source}: the model is {name}, which is {objective}, but causal_mask is {causal}")
    return Described(source, objective, head, model, notes)
