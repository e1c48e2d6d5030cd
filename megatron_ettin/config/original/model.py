"""Translate the original trainer's `model_config` to a ModelConfig.

A missing key has the trainer's own default, and every default that was used is reported. What the names of tensors
cannot show (activation, attention layer, order of rotary channels) is checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import ModelConfig

# bert-base-uncased, which the trainer starts from, with the trainer's own keys
DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 30_522, "hidden_size": 768, "intermediate_size": 3_072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "attn_out_dropout_prob": 0.0, "init_std": 0.02},
    **{"rotary_emb_base": 10_000.0, "local_attn_rotary_emb_base": -1, "sliding_window": -1},
    "global_attn_every_n_layers": -1,
}
# key -> (the trainer's default, what our model has)
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
# model.name of a YAML or the recorded class -> (objective, the head's name); a cross-trained model keeps its first head
KINDS = {
    "flex_bert": ("mlm", "head"),
    "flex_gpt": ("clm", "lm_head"),
    "flex_bert_to_gpt": ("clm", "head"),
    "flex_gpt_to_bert": ("mlm", "lm_head"),
    "FlexBertForMaskedLM": ("mlm", "head"),
    "FlexBertForCausalLM": ("clm", "lm_head"),
    "FlexGPTForCausalLM": ("clm", "head"),
    "MNTPFlexBertForMaskedLM": ("mlm", "lm_head"),
}
# (global base, rows of the phases with it, rows of the other phases)
LONG = (10_000.0, 1_024, 7_999)


def default_note(key: str, value: Any) -> str:
    """Return what is assumed for a key that a model_config does not have."""
    if key == "local_attn_rotary_emb_base":
        return "local layers have the global rotary base, as the original trainer does then"
    return f"assumed {value!r}, the original trainer's default"


def check_fixed(config: dict[str, Any], source: str) -> None:
    """Raise UserError where a model_config has something that our model has in one way only."""
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


def model_of(config: Mapping[str, Any], source: str, seq_len: Any, notes: list[str]) -> ModelConfig:
    """Return our model's keys. A vocabulary is rounded up to a multiple of 8 rows, as the trainer does.

    Args:
        config: the trainer's `model_config` with its defaults filled in.
        source: names the file in messages.
        seq_len: longest row, where a YAML has it.
        notes: lines for the user are added to it.
    """
    theta, local = float(config["rotary_emb_base"]), float(config["local_attn_rotary_emb_base"])
    # -1 means the global base to the trainer
    local = theta if local == -1 else local
    every, window = int(config["global_attn_every_n_layers"]), int(config["sliding_window"])
    if window == -1:
        every, window = 1, 128
    if every < 1:
        raise UserError(f"{source}: has no global layer (global_attn_every_n_layers {every}); our first layer is one")
    if window < 2:
        raise UserError(f"{source}: sliding_window is {window}; it is both sides of a query together, at least 2")
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    if heads < 1 or hidden < 1 or hidden % heads:
        raise UserError(f"{source}: {heads} heads do not divide hidden_size {hidden}")
    norm = config.get("norm_kwargs")
    eps = float(norm.get("eps", 1e-5)) if isinstance(norm, dict) else 1e-5
    named = {"rotary_emb_base": theta, "local_attn_rotary_emb_base": local, "norm_kwargs.eps": eps}
    for key, value in named.items():
        if not 0 < value < math.inf:
            raise UserError(f"{source}: {key} is {value}; it must be above 0")
    return ModelConfig(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        global_rope_theta=theta,
        local_rope_theta=local,
        max_position_embeddings=_positions(seq_len, theta, source, notes),
        vocab_size=-(-int(config["vocab_size"]) // 8) * 8,
        global_attention_every=every,
        encoder_window=window // 2,
        attention_output_dropout=float(config["attn_out_dropout_prob"]),
        init_std=float(config["init_std"]),
        norm_eps=eps,
    )


def _positions(seq_len: Any, theta: float, source: str, notes: list[str]) -> int:
    """Return the longest row. Rotary embeddings have no table of positions, so only a YAML's max_seq_len has it."""
    if type(seq_len) is int and seq_len > 0:
        return seq_len
    base, short, long = LONG
    rows = short if theta <= base else long
    notes.append(f"{source} does not say how long rows were: assumed {rows:,}, as the published phases with this base")
    return rows
