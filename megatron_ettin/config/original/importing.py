"""Read a YAML of the original trainer (`ettin train --config original.yaml`) as groups of this system's keys.

Every key is used, or left aside with a reason, or refused because it cannot be honoured. What the file does not have is
as under `recipe: original`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ettin.base.errors import UserError, first_line, nearest
from megatron_ettin.base.text import parse_count
from megatron_ettin.config.original import model as trainer_model
from megatron_ettin.config.original.keys import FIXED, IGNORED, reason_to_ignore
from megatron_ettin.config.tables import SIZES

MODEL = "model.model_config."
# model.name -> objective; the cross-trained encoder predicts a masked token from the position before it
OBJECTIVE_OF = {"flex_bert": "mlm", "flex_gpt": "clm", "flex_bert_to_gpt": "clm", "flex_gpt_to_bert": "mntp"}
SCHEDULES = {
    "warmup_stable_decay": "wsd",
    "one_minus_sqrt": "one_minus_sqrt",
    "constant_with_warmup": "constant",
}
# name -> (ours, whether the decay is lr x weight_decay, as torch has it, rather than weight_decay alone)
OPTIMIZERS = {
    "decoupled_stableadamw": ("stable_adamw", False),
    "stableadamw": ("stable_adamw", True),
    "decoupled_adamw": ("adamw", False),
    "adamw": ("adamw", True),
}
PRECISIONS = {"amp_bf16": "bf16", "bf16": "bf16", "fp32": "fp32"}
NEVER_BATCHES = 10**12
# default of t_decay of a warmup_stable_decay
WSD_DECAY = "0.1dur"


@dataclass
class Reading:
    """The keys of a file, flat, and which of them have been used."""

    path: Path
    keys: dict[str, Any]
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """Lines for the user about keys that were assumed or left aside."""

    def take(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or the default where the file does not have it, and mark the key as used."""
        self.used.add(key)
        return self.keys.get(key, default)

    def need(self, key: str) -> Any:
        """Return a key's value. Raises UserError where the file does not have it."""
        if self.keys.get(key) is None:
            raise self.wrong(key, "is missing; neither this system nor the original trainer has a default for it")
        return self.take(key)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a key's value as a number. Raises UserError."""
        value = self.need(key) if default is None else self.take(key, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self.wrong(key, f"is {value!r}; a number was expected") from None

    def choice(self, key: str, table: dict[str, Any]) -> Any:
        """Return the entry of a table that a key names. Raises UserError."""
        value = self.need(key)
        if value not in table:
            raise self.wrong(key, f"is {value!r}{nearest(str(value), table)}; allowed: {', '.join(table)}")
        return table[value]

    def wrong(self, key: str, what: str) -> UserError:
        """Return the error about a key of the file."""
        return UserError(f"config {self.path}: {key} {what}")


def import_yaml(content: dict[str, Any], path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], list[str]]:
    """Return (groups of our keys; objective and phase, and size where its shape is published; notes for the user).

    Raises:
        UserError: names the first key that cannot be honoured or is not known.
    """
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config {path}: {first_line(error)}") from None
    reading = Reading(path, dict(flat(resolved)))
    name = reading.need("model.name")
    if name not in OBJECTIVE_OF:
        raise reading.wrong("model.name", f"is {name!r}; allowed: {', '.join(OBJECTIVE_OF)}")
    groups: dict[str, dict[str, Any]] = {"run": {"recipe": "original"}}
    for part in (_model, _data, _batch, _schedule, _optimizer, _run):
        for group, keys in part(reading).items():
            groups.setdefault(group, {}).update({key: value for key, value in keys.items() if value is not None})
    _account_for_the_rest(reading)
    names = {"objective": OBJECTIVE_OF[name], "phase": _phase(reading, name)}
    shape = resolved["model"].get("model_config") or {}
    size = next((size for size, s in SIZES.items() if _is_shape(shape, s)), None)
    return groups, names | ({"size": size} if size else {}), reading.notes


def flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return [(prefix, tree)] if prefix else []
    return [leaf for key, value in tree.items() for leaf in flat(value, f"{prefix}.{key}" if prefix else str(key))]


def _is_shape(config: dict[str, Any], shape: Any) -> bool:
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    ours = (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads)
    return tuple(config.get(key) for key in keys) == ours


def _phase(reading: Reading, name: str) -> str:
    """Return the phase whose tables fill what the file leaves open; --phase is stronger."""
    if "_to_" in name or reading.keys.get("load_weights_only"):
        return "cross"
    if reading.keys.get("scheduler.name") == "one_minus_sqrt":
        return "extend" if reading.number("scheduler.alpha_f", 0.0) > 0.25 else "decay"
    return "pretrain"


def _model(reading: Reading) -> dict[str, dict[str, Any]]:
    """Read model.model_config as the checkpoints of the trainer are read."""
    config = {key.removeprefix(MODEL): value for key, value in reading.keys.items() if key.startswith(MODEL)}
    reading.used |= {f"{MODEL}{key}" for key in (*trainer_model.DEFAULTS, *trainer_model.FIXED)}
    for key in ("norm_kwargs.eps", "rotary_emb_dim", "local_attn_rotary_emb_dim", "initializer_range", "causal_mask"):
        reading.used.add(f"{MODEL}{key}")
    config["norm_kwargs"] = {"eps": reading.number(f"{MODEL}norm_kwargs.eps", 1e-5)}
    source, notes = f"config {reading.path}", reading.notes
    notes += [
        f"{source} has no {MODEL}{key}: {trainer_model.default_note(key, value)}"
        for key, value in trainer_model.DEFAULTS.items()
        if key not in config and key != "init_std"
    ]
    try:
        trainer_model.check_fixed(config, source)
        model = trainer_model.model_of({**trainer_model.DEFAULTS, **config}, source, _seq_len(reading), notes)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: {error}") from None
    causal = config.get("causal_mask")
    objective = OBJECTIVE_OF[reading.keys["model.name"]]
    if isinstance(causal, bool) and causal != (objective == "clm"):
        raise reading.wrong(
            f"{MODEL}causal_mask", f"is {causal}, but model.name {reading.keys['model.name']} says otherwise"
        )
    keys = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "global_rope_theta"),
        *("local_rope_theta", "vocab_size", "global_attention_every", "encoder_window", "attention_output_dropout"),
        *("init_std", "norm_eps"),
    )
    taken = {key: getattr(model, key) for key in keys}
    return {"model": {**taken, "decoder_window_keys": model.encoder_window + 1}}


def _seq_len(reading: Reading) -> int:
    value = reading.take("train_loader.dataset.max_seq_len", reading.take("max_seq_len"))
    if type(value) is not int or value < 1:
        raise reading.wrong("max_seq_len", f"is {value!r}; a number of tokens was expected")
    return value


def _data(reading: Reading) -> dict[str, dict[str, Any]]:
    default = reading.keys.get("mlm_probability", 0.3)
    probability = reading.number("train_loader.dataset.mlm_probability", default)
    if reading.keys.get("train_loader.dataset.suppress_masking"):
        probability = 0.0
    objective = OBJECTIVE_OF[reading.keys["model.name"]]
    if (objective == "clm") != (probability == 0):
        raise reading.wrong(
            "train_loader.dataset.mlm_probability",
            f"is {probability:g}, which {'no decoder has' if objective == 'clm' else 'leaves nothing to predict'}",
        )
    batching = "packed" if reading.take("train_loader.sequence_packing", False) else "padded"
    return {"data": {"seq_len": _seq_len(reading), "mlm_probability": probability, "batching": batching}}


def _batch(reading: Reading) -> dict[str, dict[str, Any]]:
    micro = reading.take("device_train_microbatch_size")
    if micro is not None and type(micro) is not int:
        reading.notes.append(f"device_train_microbatch_size {micro!r}: the tables' batch.micro_batch_rows is used")
        micro = None
    rows = reading.need("global_train_batch_size")
    tokens, low = (reading.take(f"train_loader.batch_size_warmup_{key}") for key in ("tokens", "min_size"))
    batch: dict[str, Any] = {"global_batch_rows": rows, "micro_batch_rows": micro}
    if reading.keys.get("train_loader.sequence_packing"):
        batch |= {"warmup_tokens": _tokens(reading, "train_loader.batch_size_warmup_tokens", tokens or 0, None)}
        batch |= {"warmup_min_rows": low if type(low) is int else None}
        if batch["warmup_tokens"]:
            # micro-batches of a growing batch are not all full
            batch["loss_normalization"] = "global"
    elif tokens is not None:
        reading.notes.append(
            "train_loader.batch_size_warmup_*: the original trainer heeds them with sequence_packing only"
        )
    return {"batch": batch}


def _tokens(reading: Reading, key: str, value: Any, whole: int | None) -> int:
    """Return a duration of the trainer in tokens: `3_000_000_000tok`, or `0.1dur` of the whole."""
    text = str(value)
    for unit in ("ba", "ep", "sp", "sec", "iter"):
        if text.endswith(unit):
            raise reading.wrong(key, f"is {text!r}; durations are counted in tokens here: write it as ...tok")
    if text.endswith("dur"):
        if whole is None:
            raise reading.wrong(key, f"is {text!r}; give it in tokens")
        return round(float(text.removesuffix("dur")) * whole)
    return parse_count(value, f"config {reading.path}: {key}")


def _duration(reading: Reading) -> int:
    return _tokens(reading, "max_duration", reading.need("max_duration"), None)


def _schedule(reading: Reading) -> dict[str, dict[str, Any]]:
    """Read the schedule. What the trainer itself has no default for is refused, as it stops there."""
    name, whole = reading.choice("scheduler.name", SCHEDULES), _duration(reading)
    end = reading.take("scheduler.t_max")
    if end is not None and _tokens(reading, "scheduler.t_max", end, whole) != whole:
        raise reading.wrong("scheduler.t_max", f"is {end!r}; a schedule ends with max_duration here")
    decay = reading.take("scheduler.t_decay", WSD_DECAY if name == "wsd" else 0)
    if name == "one_minus_sqrt":
        # it has no warm-up, whatever the file has
        reading.used.add("scheduler.t_warmup")
        warmup, decay = 0, reading.need("scheduler.t_decay")
    else:
        warmup = _tokens(reading, "scheduler.t_warmup", reading.need("scheduler.t_warmup"), whole)
    if name == "constant":
        reading.used.add("scheduler.alpha_f")
        final = 1.0
    else:
        final = reading.number("scheduler.alpha_f")
    decay_tokens = _tokens(reading, "scheduler.t_decay", decay, whole)
    if name == "one_minus_sqrt" and not 0 < decay_tokens <= whole:
        raise reading.wrong("scheduler.t_decay", f"is {decay!r}; it has to be above 0 and no more than max_duration")
    return {
        "schedule": {"name": name, "warmup_tokens": warmup, "decay_tokens": decay_tokens, "final_lr_fraction": final}
    }


def _optimizer(reading: Reading) -> dict[str, dict[str, Any]]:
    name, coupled = reading.choice("optimizer.name", OPTIMIZERS)
    lr, decay = reading.number("optimizer.lr"), reading.number("optimizer.weight_decay")
    betas = reading.need("optimizer.betas")
    if not (isinstance(betas, list) and len(betas) == 2):
        raise reading.wrong("optimizer.betas", f"is {betas!r}; two numbers were expected")
    optim: dict[str, Any] = {"name": name, "lr": lr, "weight_decay": decay * lr if coupled else decay}
    if coupled:
        # a weight then loses lr x weight_decay a step, as in torch
        optim["weight_decay_reference_lr"] = lr
    optim |= {"beta1": float(betas[0]), "beta2": float(betas[1]), "eps": reading.number("optimizer.eps")}
    clip = "algorithms.gradient_clipping."
    if reading.take(f"{clip}clipping_threshold") is not None:
        if reading.take(f"{clip}clipping_type", "norm") != "norm":
            raise reading.wrong(
                f"{clip}clipping_type", f"is {reading.keys[f'{clip}clipping_type']!r}; only norm is clipped"
            )
        optim["clip_grad"] = reading.number(f"{clip}clipping_threshold")
    return {"optim": optim}


def _run(reading: Reading) -> dict[str, dict[str, Any]]:
    seed = reading.take("seed")
    checkpoint: dict[str, Any] = {}
    every = reading.take("save_interval")
    if every is not None and str(every).endswith("ba"):
        checkpoint["every_steps"] = parse_count(str(every).removesuffix("ba"), "save_interval")
    elif every is not None:
        checkpoint["weights_every_tokens"] = _tokens(reading, "save_interval", every, _duration(reading))
    metrics: dict[str, Any] = {}
    interval = str(reading.take("eval_interval") or "")
    if interval.endswith("ba") and interval[:-2].isdigit() and int(interval[:-2]) < NEVER_BATCHES:
        metrics["eval_every_steps"] = int(interval[:-2])
    precision = reading.choice("precision", PRECISIONS) if "precision" in reading.keys else None
    return {
        "run": {"tokens": _duration(reading), "seed": seed},
        "precision": {"name": precision},
        "checkpoint": checkpoint,
        "metrics": metrics,
    }


def _account_for_the_rest(reading: Reading) -> None:
    """Refuse keys that were not used unless they have the only value there is here or are known not to matter. Raises
    UserError."""
    aside: dict[str, list[str]] = {}
    for key, value in reading.keys.items():
        if key in reading.used:
            continue
        if key in FIXED:
            allowed, what = FIXED[key]
            if value not in allowed:
                raise reading.wrong(key, f"is {value!r}; this system has {allowed[0]!r} only: {what}")
        elif (why := reason_to_ignore(key)) is not None:
            aside.setdefault(why, []).append(key)
        else:
            known = [*reading.used, *FIXED, *IGNORED]
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise reading.wrong(key, f"is not known{hint}; take it out if it does not decide what is learned")
    reading.notes += [f"left aside ({why}): {', '.join(keys)}" for why, keys in aside.items()]


Part = Callable[[Reading], dict[str, dict[str, Any]]]
