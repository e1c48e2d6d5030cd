"""Tables of the original trainer's keys that must have one value, or that are left aside, with the reasons.

Keys that are used are in importing.py. Together they account for all keys of the 48 published files. A trailing `.*`
stands for anything below a key."""

from __future__ import annotations

from typing import Any

_DATA = "a run reads data.mixture"
_TOKENIZER = "datasets bring their tokenizer"
_LOADING = "micro-batches are made by this system's own loader (data.workers, data.prefetch)"
_LOGGING = "metrics.* decide what is logged"
_EVALUATION = "held-out rows are data.validation, always masked at 15 %"
_STARTING = "every phase begins its steps, tokens and schedule anew; --init-from says from what"
_RESUMING = "a run directory always goes on by itself"
_UNPADDED = "padding is not computed (but with run.cuda_graph or parallel.tp_overlap)"
_OPERATIONS = "this system's own way (parallel.*, checkpoint.*)"

# key -> (what may stand there, what that says); anything else cannot be honoured
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "count_padding_tokens": ((False,), "tokens counted here are real ones"),
    "model.pretrained_model_name": (("bert-base-uncased", "google-bert/bert-base-uncased"), "the defaults behind it"),
    "model.model_config.init_method": (("full_megatron",), "the only initialisation here"),
    "model.model_config.attention_probs_dropout_prob": ((0, None), "attention has no dropout inside"),
    "model.model_config.hidden_dropout_prob": ((0, None), "hidden states have no dropout"),
    "model.model_config.embed_dropout_prob": ((0, None), "the embedding has no dropout"),
    "model.model_config.mlp_dropout_prob": ((0, None), "the MLP has no dropout"),
    "model.model_config.attn_out_bias": ((False,), "no linear layer but the output has a bias"),
    "model.model_config.attn_qkv_bias": ((False,), "no linear layer but the output has a bias"),
    "model.model_config.mlp_in_bias": ((False,), "no linear layer but the output has a bias"),
    "model.model_config.mlp_out_bias": ((False,), "no linear layer but the output has a bias"),
    "model.model_config.head_pred_bias": ((False,), "no linear layer but the output has a bias"),
    "model.model_config.decoder_bias": ((True,), "the output has a bias"),
    "model.model_config.norm_kwargs.bias": ((False,), "norms have no bias"),
    "model.model_config.embed_norm": ((True,), "the embedding has a norm"),
    "model.model_config.final_norm": ((True,), "there is a final norm"),
    "model.model_config.skip_first_prenorm": ((True,), "the first layer has no norm before its attention"),
    "model.model_config.head_pred_norm": ((True,), "the prediction head has a norm"),
    "model.model_config.loss_function": (("fa_cross_entropy", "cross_entropy"), "the loss is the cross entropy"),
    "model.model_config.loss_kwargs.reduction": (("mean",), "the loss is a mean"),
    "model.model_config.activation_function": (("gelu",), "the activation is the exact GELU"),
    "model.model_config.init_cutoff_factor": (
        (2,),
        "weights are drawn within two sigma, the trainer's default; null is three",
    ),
    "train_loader.name": (("text",), "text is what is read"),
    "train_loader.dataset.shuffle": ((True,), "data is always shuffled"),
    "train_loader.dataset.split": (("train",), "datasets are named by their folders"),
    "optimizer.filter_bias_norm_wd": ((True,), "norms and biases never decay"),
}
# key (or prefix.*) -> why it is left aside
IGNORED: dict[str, str] = {
    **dict.fromkeys(("data_local", "data_remote", "train_loader.dataset.local", "train_loader.dataset.remote"), _DATA),
    "train_loader.dataset.streaming": _DATA,
    **dict.fromkeys(("tokenizer_name", "model.tokenizer_name", "train_loader.dataset.tokenizer_name"), _TOKENIZER),
    "train_loader.dataset.shuffle_seed": "the order follows from run.seed and the phase",
    "train_loader.dataset.use_decoder_attn_mask": "the objective decides the mask",
    "train_loader.dataset.suppress_masking": "the objective decides what is masked",
    **dict.fromkeys(
        ("train_loader.drop_last", "train_loader.num_workers", "train_loader.packing_prefetch_factor"), _LOADING
    ),
    **dict.fromkeys(("train_loader.prefetch_factor", "train_loader.persistent_workers"), _LOADING),
    "eval_loader.*": _EVALUATION,
    **dict.fromkeys(("global_eval_batch_size", "device_eval_batch_size", "eval_subset_num_batches"), _EVALUATION),
    **dict.fromkeys(("callbacks.*", "loggers.*", "progress_bar", "log_to_console", "console_log_interval"), _LOGGING),
    **dict.fromkeys(("python_log_level", "optimizer.log_grad_norm", "model.disable_train_metrics"), _LOGGING),
    **dict.fromkeys(("load_path", "reset_time", "restart_override", "load_weights_only"), _STARTING),
    **dict.fromkeys(("model.pretrained_checkpoint", "init_from_checkpoint.*", "load_ignore_keys"), _STARTING),
    **dict.fromkeys(("load_strict_model_weights", "load_exclude_algorithms"), _STARTING),
    "autoresume": _RESUMING,
    **dict.fromkeys(("run_name", "save_folder"), "--run-dir names a run"),
    **dict.fromkeys(("save_num_checkpoints_to_keep", "save_overwrite", "save_filename"), _OPERATIONS),
    **dict.fromkeys(("save_latest_filename", "dist_timeout", "fsdp_config.*", "deepspeed_config.*"), _OPERATIONS),
    **dict.fromkeys(("parallelism_config.*", "device", "max_split_size_mb"), _OPERATIONS),
    **dict.fromkeys(("optimizer.foreach", "optimizer.triton", "optimizer.kahan_sum"), _OPERATIONS),
    "model.model_config.padding": _UNPADDED,
    "model.model_config.unpad_embeddings": _UNPADDED,
    "model.model_config.pad_logits": _UNPADDED,
    "model.model_config.masked_prediction": "logits are made where a label is, and nowhere else",
    "model.model_config.allow_embedding_resizing": "the vocabulary is the tokenizer's",
    "model.model_config.compile_model": "kernels are Megatron-Core's and Transformer Engine's",
    "model.model_config.use_fa2": "kernels are Megatron-Core's and Transformer Engine's",
    "model.model_config.use_sdpa_attn_mask": "kernels are Megatron-Core's and Transformer Engine's",
    "model.model_config.deterministic_fa2": "run.deterministic=true is for the whole run",
    "model.model_config.head_class_act": "there is no classification head",
    "model.model_config.head_class_norm": "there is no classification head",
    "model.model_config.pooling_type": "there is no classification head",
    "model.model_config.max_position_embeddings": "rotary embeddings have no table; data.seq_len says it",
    "mlm_probability": "the loader's own decides",
}


def reason_to_ignore(key: str) -> str | None:
    """Return why a key is left aside; None where it is not."""
    for known, why in IGNORED.items():
        if key == known or (known.endswith(".*") and (key + ".").startswith(known[:-1])):
            return why
    return None
