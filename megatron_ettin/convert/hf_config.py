"""Write config.json of both ModernBERT classes for transformers 4.56 to 5.x, and read one that 4.x or 5.x wrote.

transformers 4 reads global_rope_theta, local_rope_theta and global_attn_every_n_layers. transformers 5 reads them too,
but prefers rope_parameters and layer_types, which 4 ignores. Both sets are written, always with both thetas, because
the default of a missing local theta changed. The windows differ in meaning: an encoder's local_attention counts the
keys on both sides together, a decoder's sliding_window counts the keys up to and with the query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_object
from megatron_ettin.config.schema import ModelConfig

MODEL_TYPES = {"mlm": "modernbert", "clm": "modernbert-decoder"}
CLASSES = {"mlm": "ModernBertForMaskedLM", "clm": "ModernBertDecoderForCausalLM"}
WRITTEN_FOR = "4.56.0"
"""The oldest release that has both classes as they are written here."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
# our model supports no other values, so a config.json with another value raises UserError
_FIXED = {
    **{"norm_bias": False, "attention_bias": False, "mlp_bias": False, "decoder_bias": True},
    **{"hidden_activation": "gelu", "tie_word_embeddings": True},
}
# role -> key to read its id from if the config has no ROLE_token_id
_IDS = {"cls": "bos_token_id", "sep": "eos_token_id", "pad": ""}


def to_hf_config(model: ModelConfig, objective: str, dtype: str, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of a model's config.json.

    Args:
        model: the model's shape.
        objective: mlm or clm, which decides the class and the window.
        dtype: long name of the weights' type, such as float32.
        special_ids: ids of cls, sep and pad (others are ignored).
    """
    every = model.global_attention_every
    thetas = {_FULL: model.global_rope_theta, _SLIDING: model.local_rope_theta}
    window = model.encoder_window if objective == "mlm" else model.decoder_window_keys
    config: dict[str, Any] = {
        "architectures": [CLASSES[objective]],
        "model_type": MODEL_TYPES[objective],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "initializer_cutoff_factor": 2.0,
        **_FIXED,
        **{"attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0},
        **{"classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0},
        "global_attn_every_n_layers": every,
        "global_rope_theta": model.global_rope_theta,
        "local_rope_theta": model.local_rope_theta,
        "layer_types": [_SLIDING if i % every else _FULL for i in range(model.num_layers)],
        "rope_parameters": {layer: {"rope_theta": theta, "rope_type": "default"} for layer, theta in thetas.items()},
        "local_attention": 2 * window,
        **{f"{name}_token_id": special_ids[name] for name in ("cls", "sep", "pad")},
        **{"bos_token_id": special_ids["cls"], "eos_token_id": special_ids["sep"]},
        **{"dtype": dtype, "torch_dtype": dtype},
        "transformers_version": WRITTEN_FOR,
    }
    if objective == "mlm":
        config |= {"classifier_pooling": "cls", "sparse_prediction": False, "sparse_pred_ignore_index": -100}
    else:
        config |= {"sliding_window": window, "use_cache": True}
    return config


def reader_notes(model: ModelConfig, objective: str) -> list[str]:
    """Return notes for users of the exported folder on versions of transformers that read it differently."""
    if objective == "clm" and model.local_rope_theta != model.global_rope_theta:
        # 4.56 and 4.57 build both rotary tables of a decoder from rope_theta, which is the global one
        return [
            f"transformers 4 ignores a decoder's local rotary base ({model.local_rope_theta:g}) and uses the global one"
            f" ({model.global_rope_theta:g}): load this folder with transformers 5"
        ]
    return []


@dataclass(frozen=True)
class ParsedHfConfig:
    """Model and objective read from a config.json."""

    objective: str
    model: ModelConfig
    notes: tuple[str, ...]
    """Assumptions that were made, as lines for the user."""
    special_ids: dict[str, int]
    """Ids of those of cls, sep and pad that the config.json gives."""


def from_hf_config(path: Path) -> ParsedHfConfig:
    """Read a config.json of transformers 4 or 5. Raises UserError if it is unreadable or the model unsupported."""
    if not path.exists():
        raise UserError(f"{path}: missing; give a folder with config.json and safetensors files")
    config = load_object(path)
    try:
        objective = _objective(config, path)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: its architecture is not readable ({error})") from None
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key} is {config[key]!r}; our model has it as {value!r} only")
    notes: list[str] = []
    try:
        global_theta, local_theta = _thetas(config, objective, path, notes)
        model = ModelConfig(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            ffn_hidden_size=int(config["intermediate_size"]),
            num_attention_heads=int(config["num_attention_heads"]),
            global_rope_theta=global_theta,
            local_rope_theta=local_theta,
            max_position_embeddings=int(config.get("max_position_embeddings", 8192)),
            vocab_size=int(config["vocab_size"]),
            global_attention_every=_global_every(config, path),
            init_std=float(config.get("initializer_range", 0.02)),
            norm_eps=float(config.get("norm_eps", 1e-5)),
            **_windows(config, objective, path),
        )
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}; the model's shape is unknown") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    if model.num_attention_heads < 1 or model.hidden_size % model.num_attention_heads:
        raise UserError(f"{path}: {model.num_attention_heads} heads do not divide hidden_size {model.hidden_size}")
    ids = {role: config.get(f"{role}_token_id", config.get(other)) for role, other in _IDS.items()}
    known = {role: i for role, i in ids.items() if type(i) is int and 0 <= i < model.vocab_size}
    return ParsedHfConfig(objective, model, tuple(notes), known)


def _objective(config: dict[str, Any], path: Path) -> str:
    names, key = CLASSES, (config.get("architectures") or [None])[0]
    if key is None:
        # a config.json that was saved without a model has no architectures
        names, key = MODEL_TYPES, config.get("model_type")
    objectives = {name: objective for objective, name in names.items()}
    if key not in objectives:
        raise UserError(f"{path}: the architecture is {key}; only {' and '.join(objectives)} can be imported")
    return objectives[key]


def _thetas(config: dict[str, Any], objective: str, path: Path, notes: list[str]) -> tuple[float, float]:
    """Return the rotary bases of global and local layers; the default of the file's transformers for a missing one."""
    rope = config.get("rope_parameters") or {}
    for layer in (_FULL, _SLIDING):
        scaling = rope.get(layer) or {}
        if scaling.get("rope_type", "default") != "default":
            raise UserError(f"{path}: rope_parameters.{layer} is {scaling['rope_type']}; only unscaled rotary is known")
    if config.get("rope_scaling"):
        raise UserError(f"{path}: rope_scaling is set; only unscaled rotary is known")
    version = str(config.get("transformers_version") or "")
    # default local theta: 160000 for decoders in transformers 4, 10000 in 5; 10000 for encoders in both
    old_decoder = objective == "clm" and version.split(".")[0] in ("4", "")
    defaults = {"global": 160_000.0, "local": 160_000.0 if old_decoder else 10_000.0}
    written_by = f"transformers {version}" if version else "transformers 4 (the file names no version)"
    thetas: dict[str, float] = {}
    for name, layer in (("global", _FULL), ("local", _SLIDING)):
        new, old = (rope.get(layer) or {}).get("rope_theta"), config.get(f"{name}_rope_theta")
        if new is not None and old is not None and float(new) != float(old):
            raise UserError(
                f"{path}: rope_parameters.{layer} says {new:g}, {name}_rope_theta {old:g}; keep the right one"
            )
        theta = old if new is None else new
        if theta is None and name == "local" and "local_rope_theta" in config:
            # an explicit null: local layers share the global base
            theta = thetas["global"]
        if theta is None:
            theta = defaults[name]
            notes.append(f"config.json gives no {name} rotary base: assumed {theta:g}, the default of {written_by}")
        thetas[name] = float(theta)
    return thetas["global"], thetas["local"]


def _windows(config: dict[str, Any], objective: str, path: Path) -> dict[str, Any]:
    """Return both window keys of ModelConfig, so that the model can also be used with the other objective.

    encoder_window counts keys to each side, decoder_window_keys the keys up to and with the query. For 64 keys on each
    side, transformers' decoder has 64 keys up to and with the query, the original trainer's 65.
    """
    window = config.get("sliding_window") if objective == "clm" else None
    window = int(config.get("local_attention") or 128) // 2 if window is None else int(window)
    if window < 1:
        raise UserError(f"{path}: the window of local layers is {window}; it must be at least 1")
    encoder = window if objective == "mlm" else max(1, window - window % 2)
    return {"encoder_window": encoder, "decoder_window_keys": window}


def _global_every(config: dict[str, Any], path: Path) -> int:
    """Return the period of the global layers, from global_attn_every_n_layers (4.x) or layer_types (5.x)."""
    types = config.get("layer_types")
    if types is None:
        return int(config.get("global_attn_every_n_layers", 3))
    if len(types) != int(config["num_hidden_layers"]):
        raise UserError(f"{path}: {len(types)} layer_types for {config['num_hidden_layers']} layers")
    later = [i for i, layer in enumerate(types) if layer == _FULL and i > 0]
    every = later[0] if later else max(len(types), 1)
    if list(types) != [_SLIDING if i % every else _FULL for i in range(int(config["num_hidden_layers"]))]:
        raise UserError(f"{path}: layer_types is no regular pattern of one global layer in {every}")
    given = int(config.get("global_attn_every_n_layers", every))
    # with one global layer every longer period gives the same pattern
    return given if not later and given > every else every
