"""The original trainer's words for a model (`model_config` of its YAML, or what it recorded in the file) in ours.

A key that is missing has the trainer's own default, and every default that was used is told. What the names of the
tensors cannot show (activation, kind of attention, order of rotary channels) is checked here, the rest by the names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.layers import read_yaml
from megatron_ettin.config.original.model import DEFAULTS, KINDS, check_fixed, default_note, model_of
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.convert.composer.names import at
from megatron_ettin.convert.hf_config import MODEL_TYPES, from_hf_config


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
