"""Translate a YAML of the original trainer (`ettin train --config original.yaml`) to this system's keys.

Every key is translated, left aside with a reason, or refused, and every key of the 48 published files is known. Keys of
this system that the file does not decide are as under `recipe: original`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ettin.base.errors import UserError, first_line, nearest
from megatron_ettin.base.text import parse_count
from megatron_ettin.config.original import model as trainer_model
from megatron_ettin.config.tables import published_size

MODEL = "model.model_config."
# the cross-trained encoder predicts a masked token from the position before it
OBJECTIVES = {name: objective for name, (objective, _) in trainer_model.MODEL_NAMES.items()} | {
    "flex_gpt_to_bert": "mntp"
}
SCHEDULES = {"warmup_stable_decay": "wsd", "one_minus_sqrt": "one_minus_sqrt", "constant_with_warmup": "constant"}
OPTIMIZERS = {
    "decoupled_stableadamw": ("stable_adamw", False),
    "stableadamw": ("stable_adamw", True),
    "decoupled_adamw": ("adamw", False),
    "adamw": ("adamw", True),
}
"""name -> (our name, whether the decay is lr x weight_decay, as in torch, rather than weight_decay alone)."""
PRECISIONS = {"amp_bf16": "bf16", "bf16": "bf16", "fp32": "fp32"}
MODEL_KEYS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "global_rope_theta", "local_rope_theta"),
    *("vocab_size", "global_attention_every", "encoder_window", "attention_output_dropout", "init_std", "norm_eps"),
)
"""Keys of the `model` group that the file decides."""
NEVER_BATCHES = 10**12
WSD_DECAY = "0.1dur"
"""scheduler.t_decay of a warmup_stable_decay that has none."""

_NO_BIAS = ((False,), "no linear layer but the output has a bias")

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "count_padding_tokens": ((False,), "tokens counted here are real ones"),
    "model.pretrained_model_name": (("bert-base-uncased", "google-bert/bert-base-uncased"), "the defaults behind it"),
    f"{MODEL}init_method": (("full_megatron",), "the only initialisation here"),
    f"{MODEL}attention_probs_dropout_prob": ((0, None), "attention has no dropout inside"),
    f"{MODEL}hidden_dropout_prob": ((0, None), "hidden states have no dropout"),
    f"{MODEL}embed_dropout_prob": ((0, None), "the embedding has no dropout"),
    f"{MODEL}mlp_dropout_prob": ((0, None), "the MLP has no dropout"),
    **{f"{MODEL}{layer}_bias": _NO_BIAS for layer in ("attn_out", "attn_qkv", "mlp_in", "mlp_out", "head_pred")},
    f"{MODEL}decoder_bias": ((True,), "the output has a bias"),
    f"{MODEL}norm_kwargs.bias": ((False,), "norms have no bias"),
    f"{MODEL}embed_norm": ((True,), "the embedding has a norm"),
    f"{MODEL}final_norm": ((True,), "there is a final norm"),
    f"{MODEL}skip_first_prenorm": ((True,), "the first layer has no norm before its attention"),
    f"{MODEL}head_pred_norm": ((True,), "the prediction head has a norm"),
    f"{MODEL}loss_function": (("fa_cross_entropy", "cross_entropy"), "the loss is the cross entropy"),
    f"{MODEL}loss_kwargs.reduction": (("mean",), "the loss is a mean"),
    f"{MODEL}activation_function": (("gelu",), "the activation is the exact GELU"),
    f"{MODEL}init_cutoff_factor": ((2,), "weights are drawn within two sigma, the trainer's default; null is three"),
    "train_loader.name": (("text",), "text is what is read"),
    "train_loader.dataset.shuffle": ((True,), "data is always shuffled"),
    "train_loader.dataset.split": (("train",), "datasets are named by their folders"),
    "optimizer.filter_bias_norm_wd": ((True,), "norms and biases never decay"),
}
"""key -> (values that are accepted, what they mean); another value is refused."""

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
IGNORED = {key.replace("@", MODEL): reason for reason, keys in _REASONS.items() for key in keys.split()}
"""key (or prefix.*) -> the reason why it has no effect."""

Groups = dict[str, dict[str, Any]]


@dataclass
class TrainerYaml:
    """A file's keys by dotted name, the names of the keys that have been used, and notes for the user."""

    path: Path
    keys: dict[str, Any]
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def objective(self) -> str:
        """Return the objective that the file's model is trained for."""
        return str(self.choice("model.name", OBJECTIVES))

    @property
    def max_duration(self) -> int:
        """Return the number of tokens of the whole run. Raises UserError."""
        return self.tokens("max_duration", self.need("max_duration"))

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key and note the key as used."""
        self.used.add(key)
        return self.keys.get(key, default)

    def need(self, key: str) -> Any:
        """Return the value of a key that must be there. Raises UserError."""
        if self.keys.get(key) is None:
            raise self.error(key, "is missing; neither this system nor the original trainer has a default for it")
        return self.take(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the value of a key as a number. Raises UserError."""
        value = self.need(key) if default is None else self.take(key, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self.error(key, f"is {value!r}; a number was expected") from None

    def choice(self, key: str, table: Mapping[str, Any]) -> Any:
        """Return the entry of a table whose name is the value of a key. Raises UserError."""
        value = self.need(key)
        if value not in table:
            raise self.error(key, f"is {value!r}{nearest(str(value), table)}; allowed: {', '.join(table)}")
        return table[value]

    def tokens(self, key: str, value: Any, whole: int | None = None) -> int:
        """Return the tokens of a duration: `3_000_000_000tok`, or `0.1dur` of the `whole` run. Raises UserError."""
        text = str(value)
        if text.endswith(("ba", "ep", "sp", "sec", "iter")):
            raise self.error(key, f"is {text!r}; durations are counted in tokens here: write it as ...tok")
        if text.endswith("dur"):
            if whole is None:
                raise self.error(key, f"is {text!r}; give it in tokens")
            return round(float(text.removesuffix("dur")) * whole)
        return parse_count(value, f"config {self.path}: {key}")

    def error(self, key: str, reason: str) -> UserError:
        """Return an error that names the file and the key."""
        return UserError(f"config {self.path}: {key} {reason}")


def import_yaml(content: dict[str, Any], path: Path) -> tuple[Groups, dict[str, str], list[str]]:
    """Translate the content of a YAML file.

    Returns:
        Groups of this system's keys; names (objective, phase, and size if its shape is published); notes for the user.

    Raises:
        UserError: a key is unknown, missing, or has a value that this system does not support.
    """
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config {path}: {first_line(error)}") from None
    yaml = TrainerYaml(path, dict(_flatten(resolved)))
    names = {"objective": yaml.objective, "phase": _phase(yaml)}
    shape = resolved["model"].get("model_config")
    model = _model(yaml, shape if isinstance(shape, dict) else {})
    groups: Groups = {"model": model, "run": {"recipe": "original"}}
    for part in (_data_and_batch, _schedule, _optimizer, _run):
        for group, keys in part(yaml).items():
            groups.setdefault(group, {}).update({key: value for key, value in keys.items() if value is not None})
    _account_for_the_rest(yaml)
    size = published_size(model)
    return groups, names | ({"size": size} if size else {}), yaml.notes


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, tree


def _phase(yaml: TrainerYaml) -> str:
    """Return the phase whose tables give the keys that the file does not decide, unless the user gives --phase."""
    if "_to_" in yaml.keys["model.name"] or yaml.keys.get("load_weights_only"):
        return "cross"
    if yaml.keys.get("scheduler.name") == "one_minus_sqrt":
        return "extend" if yaml.number("scheduler.alpha_f", 0.0) > 0.25 else "decay"
    return "pretrain"


def _model(yaml: TrainerYaml, config: dict[str, Any]) -> dict[str, Any]:
    known = (*trainer_model.DEFAULTS, *trainer_model.FIXED, "norm_kwargs.eps", "rotary_emb_dim")
    known += ("local_attn_rotary_emb_dim", "initializer_range", "causal_mask")
    yaml.used |= {f"{MODEL}{key}" for key in known}
    name, source = yaml.keys["model.name"], f"config {yaml.path}"
    described = trainer_model.read_trainer_model(config, name, source, _seq_len(yaml), MODEL)
    yaml.notes += described.notes
    model = {key: getattr(described.model, key) for key in MODEL_KEYS}
    return {**model, "decoder_window_keys": described.model.encoder_window + 1}


def _seq_len(yaml: TrainerYaml) -> int:
    value = yaml.take("train_loader.dataset.max_seq_len", yaml.take("max_seq_len"))
    if type(value) is not int or value < 1:
        raise yaml.error("max_seq_len", f"is {value!r}; a number of tokens was expected")
    return value


def _data_and_batch(yaml: TrainerYaml) -> Groups:
    key = "train_loader.dataset.mlm_probability"
    probability = yaml.number(key, yaml.keys.get("mlm_probability", 0.3))
    if yaml.keys.get("train_loader.dataset.suppress_masking"):
        probability = 0.0
    if (yaml.objective == "clm") != (probability == 0):
        reason = "no decoder has" if yaml.objective == "clm" else "leaves nothing to predict"
        raise yaml.error(key, f"is {probability:g}, which {reason}")
    packed = yaml.take("train_loader.sequence_packing", False)
    micro = yaml.take("device_train_microbatch_size")
    if micro is not None and type(micro) is not int:
        yaml.notes.append(f"device_train_microbatch_size {micro!r}: the tables' batch.micro_batch_rows is used")
        micro = None
    batch: dict[str, Any] = {"global_batch_rows": yaml.need("global_train_batch_size"), "micro_batch_rows": micro}
    prefix = "train_loader.batch_size_warmup_"
    tokens, low = yaml.take(f"{prefix}tokens"), yaml.take(f"{prefix}min_size")
    if packed:
        batch["warmup_tokens"] = yaml.tokens(f"{prefix}tokens", tokens or 0)
        batch["warmup_min_rows"] = low if type(low) is int else None
        if batch["warmup_tokens"]:
            # micro-batches of a growing batch are not all full
            batch["loss_normalization"] = "global"
    elif tokens is not None:
        yaml.notes.append(f"{prefix}*: the original trainer heeds them with sequence_packing only")
    data = {"seq_len": _seq_len(yaml), "mlm_probability": probability, "batching": "packed" if packed else "padded"}
    return {"data": data, "batch": batch}


def _schedule(yaml: TrainerYaml) -> Groups:
    """Read the schedule. Raises UserError if a key is missing for which the trainer has no default either."""
    name, whole = yaml.choice("scheduler.name", SCHEDULES), yaml.max_duration
    end = yaml.take("scheduler.t_max")
    if end is not None and yaml.tokens("scheduler.t_max", end, whole) != whole:
        raise yaml.error("scheduler.t_max", f"is {end!r}; a schedule ends with max_duration here")
    decay = yaml.take("scheduler.t_decay", WSD_DECAY if name == "wsd" else 0)
    if name == "one_minus_sqrt":
        # this schedule has no warm-up, whatever the file says
        yaml.used.add("scheduler.t_warmup")
        warmup, decay = 0, yaml.need("scheduler.t_decay")
    else:
        warmup = yaml.tokens("scheduler.t_warmup", yaml.need("scheduler.t_warmup"), whole)
    yaml.used.add("scheduler.alpha_f")
    final = 1.0 if name == "constant" else yaml.number("scheduler.alpha_f")
    tokens = yaml.tokens("scheduler.t_decay", decay, whole)
    if name == "one_minus_sqrt" and not 0 < tokens <= whole:
        raise yaml.error("scheduler.t_decay", f"is {decay!r}; it has to be above 0 and no more than max_duration")
    return {"schedule": {"name": name, "warmup_tokens": warmup, "decay_tokens": tokens, "final_lr_fraction": final}}


def _optimizer(yaml: TrainerYaml) -> Groups:
    name, is_coupled = yaml.choice("optimizer.name", OPTIMIZERS)
    lr, decay = yaml.number("optimizer.lr"), yaml.number("optimizer.weight_decay")
    betas = yaml.need("optimizer.betas")
    if not (isinstance(betas, list) and len(betas) == 2):
        raise yaml.error("optimizer.betas", f"is {betas!r}; two numbers were expected")
    optim: dict[str, Any] = {"name": name, "lr": lr, "weight_decay": decay * lr if is_coupled else decay}
    if is_coupled:
        # a weight then loses lr x weight_decay a step, as in torch
        optim["weight_decay_reference_lr"] = lr
    optim |= {"beta1": float(betas[0]), "beta2": float(betas[1]), "eps": yaml.number("optimizer.eps")}
    clip = "algorithms.gradient_clipping."
    if yaml.take(f"{clip}clipping_threshold") is not None:
        if (how := yaml.take(f"{clip}clipping_type", "norm")) != "norm":
            raise yaml.error(f"{clip}clipping_type", f"is {how!r}; only norm is clipped")
        optim["clip_grad"] = yaml.number(f"{clip}clipping_threshold")
    return {"optim": optim}


def _run(yaml: TrainerYaml) -> Groups:
    groups: Groups = {"run": {"tokens": yaml.max_duration, "seed": yaml.take("seed")}}
    every = yaml.take("save_interval")
    if every is not None and str(every).endswith("ba"):
        groups["checkpoint"] = {"every_steps": parse_count(str(every).removesuffix("ba"), "save_interval")}
    elif every is not None:
        tokens = yaml.tokens("save_interval", every, yaml.max_duration)
        groups["checkpoint"] = {"weights_every_tokens": tokens}
    interval = str(yaml.take("eval_interval") or "")
    if interval.endswith("ba") and interval[:-2].isdigit() and int(interval[:-2]) < NEVER_BATCHES:
        groups["metrics"] = {"eval_every_steps": int(interval[:-2])}
    if "precision" in yaml.keys:
        groups["precision"] = {"name": yaml.choice("precision", PRECISIONS)}
    return groups


def _account_for_the_rest(yaml: TrainerYaml) -> None:
    """Check the unused keys: `FIXED` ones are compared, `IGNORED` ones noted. Raises UserError for any other."""
    aside: dict[str, list[str]] = {}
    for key, value in yaml.keys.items():
        if key in yaml.used:
            continue
        if key in FIXED:
            allowed, meaning = FIXED[key]
            if value not in allowed:
                raise yaml.error(key, f"is {value!r}; this system has {allowed[0]!r} only: {meaning}")
        elif (reason := reason_to_ignore(key)) is not None:
            aside.setdefault(reason, []).append(key)
        else:
            close = difflib.get_close_matches(key, [*yaml.used, *FIXED, *IGNORED], n=1, cutoff=0.8)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise yaml.error(key, f"is not known{hint}; take it out if it does not decide what is learned")
    yaml.notes += [f"left aside ({reason}): {', '.join(keys)}" for reason, keys in aside.items()]


def reason_to_ignore(key: str) -> str | None:
    """Return the reason why `key` has no effect; None if it is not one of `IGNORED`."""
    for known, reason in IGNORED.items():
        if key == known or (known.endswith(".*") and (key + ".").startswith(known[:-1])):
            return reason
    return None
