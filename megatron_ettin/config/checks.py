"""Check a resolved run without processes, data or torch: single values, and keys that must fit each other.

Each check raises UserError with the key, its value, the reason and what to do. `check` runs wherever a configuration is
resolved. `check_layout` (layouts.py) checks what depends on the number of ranks.
"""

from __future__ import annotations

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.text import refuse_secrets
from megatron_ettin.config.layouts import check_graphs, check_parallel, check_zero
from megatron_ettin.config.schema import Config, all_keys
from megatron_ettin.config.tables import HEAD_DIM, OBJECTIVES, PRECISIONS
from megatron_ettin.config.values import parse_points, validation_sets

# if the quotient of weight decay and its reference rate is larger, torch's coefficient (usually 0.1) was probably given
MOST_DECAY_TO_RATE = 10


def check(config: Config) -> None:
    """Run every check that does not depend on the number of ranks. Raises UserError."""
    for group in (
        check_choices,
        check_ranges,
        check_model,
        check_parallel,
        check_precision,
        check_deterministic,
        check_zero,
        check_graphs,
        check_schedule,
        check_batch,
        check_validation,
        check_secrets,
    ):
        group(config)


def check_choices(config: Config) -> None:
    """Raise UserError for a name that is none of its key's choices."""
    for name, key in all_keys().items():
        value = config.value(name)
        if key.choices and value not in key.choices:
            hint = nearest(str(value), key.choices)
            raise UserError(f"{name}: {value!r} does not exist{hint}; it is one of {', '.join(key.choices)}")


def check_ranges(config: Config) -> None:
    """Raise UserError for a number outside its key's range."""
    for name, key in all_keys().items():
        value = config.value(name)
        if key.is_bounded and value is not None and not key.allows(value):
            raise UserError(f"{name}: {value} is not allowed; it must be {key.range}")


def check_model(config: Config) -> None:
    """Raise UserError unless heads divide hidden_size, the head size is even, and rows fit max_position_embeddings."""
    model = config.model
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.num_attention_heads: {model.num_attention_heads} heads do not divide hidden_size"
            f" {model.hidden_size}"
        )
    if (model.hidden_size // model.num_attention_heads) % 2:
        raise UserError(
            f"model.num_attention_heads: a head has {model.hidden_size // model.num_attention_heads} channels, but"
            f" rotary embeddings need an even number; {HEAD_DIM} is usual"
        )
    if config.data.seq_len > model.max_position_embeddings:
        raise UserError(
            f"data.seq_len: {config.data.seq_len} is above model.max_position_embeddings"
            f" {model.max_position_embeddings}"
        )


def check_deterministic(config: Config) -> None:
    """Refuse nondeterministic kernels in a deterministic run."""
    if config.runtime.deterministic and config.parallel.tp_overlap:
        raise UserError(
            "runtime.deterministic: does not work with parallel.tp_overlap, which adds the parts of a sum in any order;"
            " set parallel.tp_overlap=false"
        )


def check_precision(config: Config) -> None:
    """Raise UserError if the shape, the layout or other keys do not allow the number format."""
    name = config.precision.name
    multiple, tp = PRECISIONS[name].multiple, config.parallel.tp
    for key in ("hidden_size", "ffn_hidden_size"):
        width = getattr(config.model, key)
        if width % (multiple * tp):
            raise UserError(
                f"precision.name: {name} needs {key} / tp to be a multiple of {multiple}, but it is {width} / {tp}"
            )
    if config.precision.gradients == "bf16" and PRECISIONS[name].compute == "fp32":
        raise UserError("precision.gradients: bf16 needs a 16-bit or FP8 run, but precision.name is fp32")
    check_fp8_weights(config)
    first, last = config.precision.bf16_first_layers, config.precision.bf16_last_layers
    if first + last and PRECISIONS[name].fp8_recipe is None:
        raise UserError(f"precision.bf16_first_layers, bf16_last_layers: need an FP8 run, but precision.name is {name}")
    if first + last and PRECISIONS[name].fp8_recipe == "delayed":
        raise UserError(
            "precision.bf16_first_layers, bf16_last_layers: Megatron-Core's delayed scaling applies to all layers; use"
            " fp8-current, fp8-blockwise or mxfp8 to keep some in bf16"
        )
    if first + last >= config.model.num_layers:
        raise UserError(
            f"precision.bf16_first_layers + bf16_last_layers: {first} + {last} leave none of the"
            f" {config.model.num_layers} layers in FP8; use precision.name=bf16"
        )


def check_fp8_weights(config: Config) -> None:
    """Raise UserError if `precision.fp8_weights` is set and the format or the optimizer does not allow it."""
    if not config.precision.fp8_weights:
        return
    name = config.precision.name
    # core keeps and gathers the weights of mxfp8 in bf16
    if PRECISIONS[name].fp8_recipe in (None, "mxfp8"):
        raise UserError(
            f"precision.fp8_weights: needs fp8-delayed, fp8-current or fp8-blockwise, but precision.name is {name}"
        )
    if not config.parallel.distributed_optimizer:
        raise UserError(
            "precision.fp8_weights: needs parallel.distributed_optimizer=true, because the weights are made from its"
            " fp32 masters"
        )


def check_weight_decay(config: Config) -> None:
    """Refuse a weight decay above 10 times the reference lr: it is probably torch's, which torch multiplies by lr."""
    decay, reference = config.optim.weight_decay, config.optim.weight_decay_reference_lr
    if decay > MOST_DECAY_TO_RATE * reference:
        raise UserError(
            f"optim.weight_decay: {decay:g} is what a weight loses a step at optim.weight_decay_reference_lr"
            f" {reference:g}, and more than {MOST_DECAY_TO_RATE} x that rate; torch's AdamW multiplies its coefficient"
            f" by the rate: {decay:g} there is {decay * reference:.2g} here. Give the product, or set"
            " optim.weight_decay_reference_lr to the rate that it is for"
        )


def check_schedule(config: Config) -> None:
    """Raise UserError if warm-up and decay do not fit into the run."""
    schedule, run = config.schedule, config.run
    if schedule.name == "one_minus_sqrt" and schedule.decay_tokens == 0:
        raise UserError("schedule.decay_tokens: one_minus_sqrt decays over them, so 0 is not allowed")
    key, end = ("run.tokens", run.tokens) if schedule.end_tokens is None else ("end_tokens", schedule.end_tokens)
    if schedule.name == "wsd" and schedule.warmup_tokens + schedule.decay_tokens > end:
        raise UserError(
            f"schedule.warmup_tokens + decay_tokens: {schedule.warmup_tokens} + {schedule.decay_tokens} is more than"
            f" {key} {end}"
        )
    if schedule.name == "one_minus_sqrt" and schedule.decay_tokens > end:
        raise UserError(
            f"schedule.decay_tokens: {schedule.decay_tokens} is more than {key} {end}, over the last of which it decays"
        )


def check_batch(config: Config) -> None:
    """Raise UserError if rows, batch warm-up, loss normalisation and objective do not fit each other."""
    batch = config.batch
    if batch.global_batch_rows % batch.micro_batch_rows and batch.loss_normalization == "microbatch":
        raise UserError(
            f"batch.global_batch_rows: {batch.global_batch_rows} is not a multiple of micro_batch_rows"
            f" {batch.micro_batch_rows}, but loss_normalization=microbatch gives all micro-batches the same weight"
        )
    if batch.warmup_tokens and batch.warmup_min_rows > batch.global_batch_rows:
        raise UserError(
            f"batch.warmup_min_rows: {batch.warmup_min_rows} is above global_batch_rows {batch.global_batch_rows}"
        )
    if batch.loss_normalization == "microbatch" and batch.warmup_tokens:
        raise UserError(
            "batch.loss_normalization: microbatch counts micro-batches, but a batch warm-up has empty ones; set"
            f" batch.warmup_tokens=0 (found {batch.warmup_tokens})"
        )
    objective = OBJECTIVES[config.run.objective]
    if objective.needs_mask_token and config.data.mlm_probability == 0:
        raise UserError("data.mlm_probability: 0 leaves the encoder nothing to predict; the recipe has 0.30 or 0.15")
    if objective.is_hybrid:
        parse_points(config.data.clm_fraction, "data.clm_fraction")
    elif config.data.clm_fraction is not None:
        hybrid = ", ".join(name for name, one in OBJECTIVES.items() if one.is_hybrid)
        raise UserError(f"data.clm_fraction: needs objective {hybrid}; all rows of {config.run.objective} are alike")


def check_validation(config: Config) -> None:
    """Raise UserError if `data.validation` is set and does not name datasets."""
    if config.data.validation is not None:
        validation_sets(config.data.validation)


def check_secrets(config: Config) -> None:
    """Raise UserError if a value is a URL with a password, token or signature in it."""
    for name in all_keys():
        refuse_secrets(str(config.value(name)), name)
