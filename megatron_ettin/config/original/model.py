"""Read the original trainer's description of a model: `model_config` of its YAML, or the same keys in a checkpoint.

A missing key takes the trainer's own default, and the result notes every default that is used. The activation, the type
of attention and the order of rotary channels cannot be seen from the names of tensors, so they are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import ModelConfig

# defaults of bert-base-uncased, from which the trainer starts, and of the trainer's own keys
DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 30_522, "hidden_size": 768, "intermediate_size": 3_072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "attn_out_dropout_prob": 0.0, "init_std": 0.02},
    **{"rotary_emb_base": 10_000.0, "local_attn_rotary_emb_base": -1, "sliding_window": -1},
    "global_attn_every_n_layers": -1,
}
FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention_layer": ("base", ("rope",)),
    "bert_layer": ("prenorm", ("prenorm", "compile_prenorm")),
    "embedding_layer": ("absolute_pos", ("sans_pos",)),
    "mlp_layer": ("mlp", ("glu",)),
    "normalization": ("rmsnorm", ("layernorm", "triton_layernorm")),
    "hidden_act": ("gelu", ("gelu",)),
    "head_pred_act": ("silu", ("gelu",)),
    "rotary_emb_interleaved": (False, (False,)),
    "rotary_emb_scale_base": (None, (None,)),
    "initial_attention_layer": (None, (None, "rope")),
    "initial_bert_layer": (None, (None, "prenorm")),
    "initial_mlp_layer": (None, (None, "glu")),
}
"""Keys with one meaning here: key -> (the trainer's default, the values that this package accepts)."""
MODEL_NAMES = {
    "flex_bert": ("mlm", "head"),
    "flex_gpt": ("clm", "lm_head"),
    "flex_bert_to_gpt": ("clm", "head"),
    "flex_gpt_to_bert": ("mlm", "lm_head"),
}
"""model.name of a YAML -> (objective, name of the head). A cross-trained model keeps its first head."""
CLASSES = MODEL_NAMES | {
    "FlexBertForMaskedLM": ("mlm", "head"),
    "FlexBertForCausalLM": ("clm", "lm_head"),
    "FlexGPTForCausalLM": ("clm", "head"),
    "MNTPFlexBertForMaskedLM": ("mlm", "lm_head"),
}
"""`MODEL_NAMES`, and in addition the class names that checkpoints record."""
_SHORT_BASE, _SHORT_ROW, _LONG_ROW = 10_000.0, 1_024, 7_999


@dataclass(frozen=True)
class TrainerModel:
    """A model as a configuration of the original trainer describes it."""

    source: str
    """Origin of the description, for messages."""
    objective: str | None
    """Training objective; None if the configuration does not name it."""
    head: str | None
    """Expected name of the head in a checkpoint: `head` or `lm_head`; None if it is not known."""
    model: ModelConfig
    notes: list[str]
    """One line for each default or assumption that was used."""


def read_trainer_model(
    config: Mapping[str, Any],
    name: object,
    source: str,
    seq_len: object,
    prefix: str = "",
) -> TrainerModel:
    """Translate the trainer's keys of a model.

    Args:
        config: the keys of `model_config`.
        name: model.name of a YAML, or the class that a checkpoint records; None if neither is known.
        source: the file, for messages.
        seq_len: number of tokens in a row, if the file has it.
        prefix: prefix of the keys in the file, for notes.

    Raises:
        UserError: a value is malformed, or this package's model does not support it.
    """
    # YAML files leave out init_std on purpose, and so do checkpoints that record initializer_range
    expected = DEFAULTS.keys() - ({"init_std"} if prefix or "initializer_range" in config else set())
    notes = [
        f"{source} has no {prefix}{key}: {_default_note(key, value)}"
        for key, value in DEFAULTS.items()
        if key in expected and key not in config
    ]
    try:
        _check_fixed(config, source)
        model = _model_config({**DEFAULTS, **config}, source, seq_len, notes)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: {error}") from None
    objective, head = CLASSES.get(name, (None, None)) if isinstance(name, str) else (None, None)
    causal = config.get("causal_mask")
    if objective is None and isinstance(causal, bool):
        objective, head = MODEL_NAMES["flex_gpt" if causal else "flex_bert"]
    elif isinstance(causal, bool) and causal != (objective == "clm"):
        raise UserError(f"{source}: {prefix}causal_mask is {causal}, but {name} is {objective}")
    return TrainerModel(source, objective, head, model, notes)


def _default_note(key: str, value: Any) -> str:
    if key == "local_attn_rotary_emb_base":
        return "local layers have the global rotary base, as the original trainer does then"
    return f"assumed {value!r}, the original trainer's default"


def _check_fixed(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError for a setting that this package's model does not support."""
    for key, (default, allowed) in FIXED.items():
        value = config.get(key, default)
        plain = value.removeprefix("unpadded_").removeprefix("padded_") if isinstance(value, str) else value
        if plain not in allowed:
            how = "" if key in config else " (not given: the trainer's default)"
            raise UserError(f"{source}: {key} is {value!r}{how}; our model has it as {allowed[0]!r} only")
    heads = max(int(config.get("num_attention_heads", DEFAULTS["num_attention_heads"])), 1)
    head_dim = int(config.get("hidden_size", DEFAULTS["hidden_size"])) // heads
    for key in ("rotary_emb_dim", "local_attn_rotary_emb_dim"):
        if config.get(key) not in (None, head_dim):
            raise UserError(f"{source}: {key} is {config[key]!r}; our model turns all {head_dim} channels of a head")


def _model_config(config: Mapping[str, Any], source: str, seq_len: object, notes: list[str]) -> ModelConfig:
    """Build the ModelConfig. The vocabulary is rounded up to a multiple of 8 rows, as the trainer does."""
    theta, local = float(config["rotary_emb_base"]), float(config["local_attn_rotary_emb_base"])
    if local == -1:
        # -1 in the trainer means the base of the global layers
        local = theta
    every, window = int(config["global_attn_every_n_layers"]), int(config["sliding_window"])
    if window == -1:
        every, window = 1, 128
    if every < 1:
        raise UserError(f"{source}: has no global layer (global_attn_every_n_layers {every}); our first layer is one")
    if window < 2:
        raise UserError(f"{source}: sliding_window is {window}; it counts both sides of a query and must be at least 2")
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    if heads < 1 or hidden < 1 or hidden % heads:
        raise UserError(f"{source}: {heads} heads do not divide hidden_size {hidden}")
    norm = config.get("norm_kwargs")
    eps = float(norm.get("eps", 1e-5)) if isinstance(norm, dict) else 1e-5
    positive = {"rotary_emb_base": theta, "local_attn_rotary_emb_base": local, "norm_kwargs.eps": eps}
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"{source}: {key} is {value}; it must be above 0")
    if not (type(seq_len) is int and seq_len > 0):
        # rotary embeddings have no table of positions, so without max_seq_len of a YAML the length is derived
        seq_len = _SHORT_ROW if theta <= _SHORT_BASE else _LONG_ROW
        notes.append(
            f"{source} does not say how long rows were: assumed {seq_len:,}, as the published phases with this base"
        )
    return ModelConfig(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        global_rope_theta=theta,
        local_rope_theta=local,
        max_position_embeddings=seq_len,
        vocab_size=-(-int(config["vocab_size"]) // 8) * 8,
        global_attention_every=every,
        encoder_window=window // 2,
        attention_output_dropout=float(config["attn_out_dropout_prob"]),
        init_std=float(config["init_std"]),
        norm_eps=eps,
    )
