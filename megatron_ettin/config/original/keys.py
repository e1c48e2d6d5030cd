"""List the keys of the original trainer's YAML that are not translated, with the values they must have or a reason.

Translated keys are in `importing.py`; together they account for every key of the 48 published files.
"""

from __future__ import annotations

from typing import Any

_MODEL = "model.model_config."
_NO_BIAS = ((False,), "no linear layer but the output has a bias")

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "count_padding_tokens": ((False,), "tokens counted here are real ones"),
    "model.pretrained_model_name": (("bert-base-uncased", "google-bert/bert-base-uncased"), "the defaults behind it"),
    f"{_MODEL}init_method": (("full_megatron",), "the only initialisation here"),
    f"{_MODEL}attention_probs_dropout_prob": ((0, None), "attention has no dropout inside"),
    f"{_MODEL}hidden_dropout_prob": ((0, None), "hidden states have no dropout"),
    f"{_MODEL}embed_dropout_prob": ((0, None), "the embedding has no dropout"),
    f"{_MODEL}mlp_dropout_prob": ((0, None), "the MLP has no dropout"),
    **{f"{_MODEL}{layer}_bias": _NO_BIAS for layer in ("attn_out", "attn_qkv", "mlp_in", "mlp_out", "head_pred")},
    f"{_MODEL}decoder_bias": ((True,), "the output has a bias"),
    f"{_MODEL}norm_kwargs.bias": ((False,), "norms have no bias"),
    f"{_MODEL}embed_norm": ((True,), "the embedding has a norm"),
    f"{_MODEL}final_norm": ((True,), "there is a final norm"),
    f"{_MODEL}skip_first_prenorm": ((True,), "the first layer has no norm before its attention"),
    f"{_MODEL}head_pred_norm": ((True,), "the prediction head has a norm"),
    f"{_MODEL}loss_function": (("fa_cross_entropy", "cross_entropy"), "the loss is the cross entropy"),
    f"{_MODEL}loss_kwargs.reduction": (("mean",), "the loss is a mean"),
    f"{_MODEL}activation_function": (("gelu",), "the activation is the exact GELU"),
    f"{_MODEL}init_cutoff_factor": ((2,), "weights are drawn within two sigma, the trainer's default; null is three"),
    "train_loader.name": (("text",), "text is what is read"),
    "train_loader.dataset.shuffle": ((True,), "data is always shuffled"),
    "train_loader.dataset.split": (("train",), "datasets are named by their folders"),
    "optimizer.filter_bias_norm_wd": ((True,), "norms and biases never decay"),
}
"""key -> (values that are honoured, what they mean); another value is refused."""

_REASONS = {
    "a run reads data.mixture": "data_local data_remote train_loader.dataset.local train_loader.dataset.remote"
    " train_loader.dataset.streaming",
    "datasets bring their tokenizer": "tokenizer_name model.tokenizer_name train_loader.dataset.tokenizer_name",
    "the order follows from run.seed and the phase": "train_loader.dataset.shuffle_seed",
    "the objective decides the mask": "train_loader.dataset.use_decoder_attn_mask",
    "the objective decides what is masked": "train_loader.dataset.suppress_masking",
    "micro-batches are made by this system's own loader (data.workers, data.prefetch)": "train_loader.drop_last"
    " train_loader.num_workers train_loader.packing_prefetch_factor train_loader.prefetch_factor"
    " train_loader.persistent_workers",
    "held-out rows are data.validation, always masked at 15 %": "eval_loader.* global_eval_batch_size"
    " device_eval_batch_size eval_subset_num_batches",
    "metrics.* decide what is logged": "callbacks.* loggers.* progress_bar log_to_console console_log_interval"
    " python_log_level optimizer.log_grad_norm model.disable_train_metrics",
    "every phase begins its steps, tokens and schedule anew; --init-from says from what": "load_path reset_time"
    " restart_override load_weights_only model.pretrained_checkpoint init_from_checkpoint.* load_ignore_keys"
    " load_strict_model_weights load_exclude_algorithms",
    "a run directory always goes on by itself": "autoresume",
    "--run-dir names a run": "run_name save_folder",
    "this system's own way (parallel.*, checkpoint.*)": "save_num_checkpoints_to_keep save_overwrite save_filename"
    " save_latest_filename dist_timeout fsdp_config.* deepspeed_config.* parallelism_config.* device max_split_size_mb"
    " optimizer.foreach optimizer.triton optimizer.kahan_sum",
    "padding is not computed (but with runtime.cuda_graph or parallel.tp_overlap)": "@padding @unpad_embeddings"
    " @pad_logits",
    "logits are made where a label is, and nowhere else": "@masked_prediction",
    "the vocabulary is the tokenizer's": "@allow_embedding_resizing",
    "kernels are Megatron-Core's and Transformer Engine's": "@compile_model @use_fa2 @use_sdpa_attn_mask",
    "runtime.deterministic=true is for the whole run": "@deterministic_fa2",
    "there is no classification head": "@head_class_act @head_class_norm @pooling_type",
    "rotary embeddings have no table; data.seq_len says it": "@max_position_embeddings",
    "the loader's own decides": "mlm_probability",
}
"""reason -> keys, with `@` for those of the model and `.*` for anything below a key."""
IGNORED = {key.replace("@", _MODEL): reason for reason, keys in _REASONS.items() for key in keys.split()}
"""key (or prefix.*) -> the reason why it is left aside."""


def reason_to_ignore(key: str) -> str | None:
    """Return why `key` is left aside; None where it is not."""
    for known, reason in IGNORED.items():
        if key == known or (known.endswith(".*") and (key + ".").startswith(known[:-1])):
            return reason
    return None
