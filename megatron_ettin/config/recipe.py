"""The runs of the tables: (size, objective, phase) as published, or with the original trainer's choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.config.objectives import OBJECTIVES
from megatron_ettin.config.phases import ORIGINAL_LOCAL_THETA, ORIGINAL_MEAN_TOKENS, PHASES, WEIGHT_DECAY
from megatron_ettin.config.schema import (
    CHOICES,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunSettings,
    ScheduleConfig,
)
from megatron_ettin.config.sizes import SIZES

ORIGINAL_DECODER_KEYS = 65
CLM_FRACTION = 0.5  # of a hybrid run's rows, unless told otherwise


def choose(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"{kind} {name!r} does not exist{nearest(name, table)}; it is one of {', '.join(table)}")
    return table[name]


def recipe(size: str, objective: str, phase: str, batching: str | None = None, name: str = "paired") -> Config:
    """The published run of these three names: `paired`, as a pair that transformers computes as it was trained, or
    `original`, with the choices of the original trainer (docs/recipe.md). batching: `packed` rows, or `padded`
    sequences as the original has them."""
    choose("recipe", name, dict.fromkeys(CHOICES["run.recipe"]))
    if name == "original":
        return original(paired(size, objective, phase, batching or "padded"))
    return paired(size, objective, phase, batching or "packed")


def original(config: Config) -> Config:
    """A run of the tables with what the original trainer did otherwise. It made every update, whatever its figures."""
    run, model, data, batch = config.run, config.model, config.data, config.batch
    objective = "mntp" if (run.phase, run.objective) == ("cross", "mlm") else run.objective
    theta = ORIGINAL_LOCAL_THETA[run.phase, OBJECTIVES[objective].exports[0]][run.size]
    mean = ORIGINAL_MEAN_TOKENS if run.phase == "pretrain" and data.batching == "padded" else None
    return dataclasses.replace(
        config,
        run=dataclasses.replace(run, recipe="original", objective=objective),
        model=dataclasses.replace(
            model, local_rope_theta=theta, decoder_window_keys=ORIGINAL_DECODER_KEYS, output_bias_init="uniform"
        ),
        data=dataclasses.replace(data, mean_tokens_per_row=mean),
        batch=dataclasses.replace(batch, loss_normalization="microbatch"),
        resilience=dataclasses.replace(config.resilience, on_nonfinite="ignore", on_spike="ignore"),
    )


def paired(size: str, objective: str, phase: str, batching: str) -> Config:
    shape, chosen = choose("size", size, SIZES), choose("phase", phase, PHASES)
    choose("objective", objective, OBJECTIVES)
    rows = chosen.padded if batching == "padded" else chosen.packed
    return Config(
        run=RunSettings(size, objective, phase, chosen.tokens[size], chosen.seed),
        model=ModelConfig(
            **dataclasses.asdict(shape),
            global_rope_theta=chosen.global_rope_theta,
            local_rope_theta=chosen.local_rope_theta[size],
            max_position_embeddings=rows.seq_len,
        ),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(),
        optim=OptimConfig(chosen.lr[size], chosen.max_lr[size], WEIGHT_DECAY[size]),
        schedule=ScheduleConfig(
            chosen.schedule, chosen.warmup_tokens[size], chosen.decay_tokens[size], chosen.final_lr_fraction
        ),
        data=DataConfig(
            rows.seq_len,
            chosen.mlm_probability if OBJECTIVES[objective].needs_mask_token else 0.0,
            clm_fraction=CLM_FRACTION if OBJECTIVES[objective].is_hybrid else None,
            batching=batching,
        ),
        batch=BatchConfig(
            rows.global_rows,
            rows.micro_rows[size],
            warmup_tokens=0,  # as every published run was trained; `--explain` names what their files configure
            warmup_min_rows=PHASES["pretrain"].packed.micro_rows[size]
            if batching == "packed"
            else rows.micro_rows[size],
        ),
        checkpoint=CheckpointConfig(weights_every_tokens=chosen.save_every_tokens[size]),
    )
