"""Write YAML files with the original trainer's keys from the published numbers (tests/config/test_tables.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.config.test_tables import BATCH_WARMUP, DECAY, MICRO, PEAK, SIZE_TABLE, WARMUP

B = 10**9
FIXED_MODEL = {
    **{"vocab_size": 50368, "init_method": "full_megatron", "attention_layer": "rope", "bert_layer": "prenorm"},
    **{"attention_probs_dropout_prob": 0.0, "attn_out_bias": False, "attn_out_dropout_prob": 0.1},
    **{"attn_qkv_bias": False, "embed_dropout_prob": 0.0, "embed_norm": True, "final_norm": True},
    **{"skip_first_prenorm": True, "embedding_layer": "sans_pos", "loss_function": "fa_cross_entropy"},
    **{"loss_kwargs": {"reduction": "mean"}, "mlp_dropout_prob": 0.0, "mlp_in_bias": False, "mlp_layer": "glu"},
    **{"mlp_out_bias": False, "normalization": "layernorm", "norm_kwargs": {"eps": "1e-5", "bias": False}},
    **{"hidden_act": "gelu", "head_pred_act": "gelu", "activation_function": "gelu", "padding": "unpadded"},
    **{"rotary_emb_dim": None, "rotary_emb_scale_base": None, "rotary_emb_interleaved": False},
    **{"allow_embedding_resizing": True, "sliding_window": 128, "global_attn_every_n_layers": 3},
    **{"unpad_embeddings": True, "compile_model": True},
}
LOCAL_10K = {("extend", "17m", "mlm"), ("extend", "17m", "clm")} | {
    ("decay", s, "clm") for s in ("17m", "32m", "68m", "400m")
}


def tok(tokens: float) -> str:
    return f"{int(tokens):_}tok"


def original(size: str, objective: str, phase: str) -> dict[str, Any]:
    """Return the content of the published file for this size, objective and phase."""
    causal, cross, long = objective == "clm", phase == "cross", phase != "pretrain"
    order = list(SIZE_TABLE).index(size)
    third = 3 if size == "1b" else 1
    chance = 0.0 if causal else 0.15 if phase in ("decay", "cross") else 0.3
    peak = PEAK[size] / 2 if phase in ("decay", "cross") else PEAK[size]
    layers, hidden, ffn, heads = SIZE_TABLE[size][:4]
    tokens = {"pretrain": 1700 * B, "extend": 250 * B / third, "decay": 50 * B / third, "cross": 50 * B / third}[phase]
    tokens = {83_333_333_333: 83_333_000_000, 16_666_666_666: 16_666_666_667}.get(int(tokens), int(tokens))
    model = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads}
    model |= {"rotary_emb_base": 160000.0 if long else 10000.0, "masked_prediction": not causal, **FIXED_MODEL}
    if causal:
        model |= {"causal_mask": True, "pad_logits": True}
    if long:
        model["local_attn_rotary_emb_base"] = 10000.0 if (phase, size, objective) in LOCAL_10K else 160000.0
    if cross:
        warm, end = (1 * B, 3_333_000_000) if size == "1b" else (3 * B, 10 * B)
        schedule = {"name": "warmup_stable_decay", "t_warmup": tok(warm), "alpha_f": 0.02, "t_decay": tok(end)}
    elif long:
        final = 0.5 if phase == "extend" else 0.04
        schedule = {"name": "one_minus_sqrt", "t_decay": "${max_duration}", "alpha_f": final}
    else:
        schedule = {"name": "warmup_stable_decay", "t_warmup": tok(WARMUP[size]), "alpha_f": 0.02, "t_decay": "0tok"}
    decoder = {"use_decoder_attn_mask": True, "suppress_masking": True} if causal else {}
    architecture = {("mlm", False): "flex_bert", ("clm", False): "flex_gpt"} | {
        ("mlm", True): "flex_gpt_to_bert",
        ("clm", True): "flex_bert_to_gpt",
    }
    warmup = BATCH_WARMUP[size] if phase == "pretrain" else 10 * B if cross else 0
    content: dict[str, Any] = {
        **{"data_local": "somewhere", "data_remote": None, "max_seq_len": 7999 if long else 1024},
        **{"tokenizer_name": "bclavie/olmo_bert_template", "mlm_probability": chance, "count_padding_tokens": False},
        "run_name": "any",
        "model": {
            **{"name": architecture[objective, cross], "pretrained_model_name": "bert-base-uncased"},
            **{"tokenizer_name": "${tokenizer_name}", "disable_train_metrics": True, "model_config": model},
        },
        "train_loader": {
            "name": "text",
            "dataset": {
                **{"local": "${data_local}", "remote": "${data_remote}", "split": "train", "shuffle": True},
                **{"tokenizer_name": "${tokenizer_name}", "max_seq_len": "${max_seq_len}", "streaming": False},
                **{"mlm_probability": "${mlm_probability}", "shuffle_seed": 21, **decoder},
            },
            **{"drop_last": True, "num_workers": 6, "sequence_packing": False},
            **{"batch_size_warmup_min_size": "${device_train_microbatch_size}"},
            "batch_size_warmup_tokens": tok(warmup),
        },
        "scheduler": schedule,
        "optimizer": {
            **{"name": "decoupled_stableadamw", "lr": peak, "betas": [0.9, 0.98], "eps": 1e-6},
            **{"weight_decay": DECAY[size], "filter_bias_norm_wd": True, "log_grad_norm": True},
        },
        **{"max_duration": tok(tokens), "eval_interval": "99999999999999999999999999999999ba"},
        **{"global_train_batch_size": 4608, "global_eval_batch_size": 1024, "seed": 210 if cross else 21},
        **{"device_eval_batch_size": 8, "device_train_microbatch_size": MICRO[phase][order], "precision": "amp_bf16"},
        **{"progress_bar": True, "log_to_console": True, "console_log_interval": "100ba"},
        "callbacks": {"speed_monitor": {"window_size": 100}, "lr_monitor": {}},
        "loggers": {"wandb": {"project": "p", "entity": "e"}},
        **{"save_interval": tok(8.5 * B), "save_num_checkpoints_to_keep": 100000, "save_folder": "f"},
    }
    if long:
        content |= {"load_path": "p", "reset_time": True}
    if cross:
        content["load_weights_only"] = True
    else:
        content |= {"autoresume": True, "eval_loader": {"name": "text", "dataset": {"split": "validation"}}}
    return content


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
