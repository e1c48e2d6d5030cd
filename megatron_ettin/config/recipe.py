"""List the recipe: the published run of each size, objective and phase, and the original trainer's choices.

Numbers are those of the 48 published configurations, with two differences. Packed batching has other rows than the
published padded batching. In pretrain they hold the same tokens per step: 4,608 sequences of about 615 tokens, 2.84M.
The mean length of the later phases' sequences is not known; a packed step has up to 1,024 x 8,192 tokens there.
`local_rope_theta` is the same for both objectives of a pair; ORIGINAL_LOCAL_THETA has the published values. The 1b has
a third of the other sizes' tokens in every phase but pretrain, whose configuration has 1.7T too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.config.operations import CheckpointConfig, ParallelConfig
from megatron_ettin.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunSettings,
    ScheduleConfig,
    all_keys,
)
from megatron_ettin.config.tables import OBJECTIVES, SIZES

ORIGINAL_DECODER_KEYS = 65
# default share of causal rows of a hybrid run
CLM_FRACTION = 0.5


def choose(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return an entry of a table. Raises UserError with the nearest name if there is none; `what` begins it."""
    if name not in table:
        raise UserError(f"{what} {name!r} does not exist{nearest(name, table)}; it is one of {', '.join(table)}")
    return table[name]


def recipe(size: str, objective: str, phase: str, batching: str | None = None, name: str = "paired") -> Config:
    """Return a published run. Raises UserError for names that do not exist.

    Args:
        size: published size.
        objective: training objective.
        phase: phase of the recipe.
        batching: `packed` or `padded`; by default packed for `paired` and padded for `original`.
        name: `paired`, with the choices of this system, or `original`, with those of the original trainer
            (docs/recipe.md).
    """
    choose("recipe", name, dict.fromkeys(all_keys()["run.recipe"].choices))
    if name == "original":
        return original(paired(size, objective, phase, batching or "padded"))
    return paired(size, objective, phase, batching or "packed")


def original(config: Config) -> Config:
    """Return a run of the tables with the choices of the original trainer, which made every update, good or bad."""
    run, data = config.run, config.data
    objective = "mntp" if (run.phase, run.objective) == ("cross", "mlm") else run.objective
    theta = ORIGINAL_LOCAL_THETA[run.phase, OBJECTIVES[objective].exports[0]][run.size]
    mean = ORIGINAL_MEAN_TOKENS if run.phase == "pretrain" and data.batching == "padded" else None
    return config.with_keys(
        {
            "run.recipe": "original",
            "run.objective": objective,
            "model.local_rope_theta": theta,
            "model.decoder_window_keys": ORIGINAL_DECODER_KEYS,
            "model.output_bias_init": "uniform",
            "data.mean_tokens_per_row": mean,
            "batch.loss_normalization": "microbatch",
            "resilience.on_nonfinite": "ignore",
            "resilience.on_spike": "ignore",
        }
    )


def paired(size: str, objective: str, phase: str, batching: str) -> Config:
    """Return a run of the tables with this system's choices. Raises UserError for names that do not exist."""
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
        optim=OptimConfig(chosen.lr[size], chosen.weight_decay_reference_lr[size], WEIGHT_DECAY[size]),
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
            # as every published run was trained; `--explain` names what their files configure
            warmup_tokens=0,
            warmup_min_rows=PHASES["pretrain"].packed.micro_rows[size]
            if batching == "packed"
            else rows.micro_rows[size],
        ),
        checkpoint=CheckpointConfig(weights_every_tokens=chosen.save_every_tokens[size]),
    )


B = 10**9
SIZE_NAMES = ("17m", "32m", "68m", "150m", "400m", "1b")


def by_size(*values: float) -> dict[str, float]:
    """Return one value per size, smallest size first."""
    return dict(zip(SIZE_NAMES, values, strict=True))


def counts(*values: float) -> dict[str, int]:
    """Return one whole number per size, smallest size first."""
    return {size: int(value) for size, value in by_size(*values).items()}


PEAK_LR = by_size(3e-3, 3e-3, 3e-3, 8e-4, 5e-4, 5e-4)
# peak learning rate of the phases decay and cross
BASE_LR = by_size(1.5e-3, 1.5e-3, 1.5e-3, 4e-4, 2.5e-4, 2.5e-4)
# coefficient of the fully decoupled decay
WEIGHT_DECAY = by_size(3e-4, 3e-4, 3e-4, 1e-5, 1e-5, 5e-5)
NOTHING = counts(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Batching:
    """Length of a row, and rows of a batch, for packed or for padded batching."""

    seq_len: int
    global_rows: int
    micro_rows: dict[str, int]
    """Default micro-batch of a single accelerator, by size."""


@dataclass(frozen=True)
class Phase:
    """Hyperparameters of one phase; dicts are by size."""

    tokens: dict[str, int]
    lr: dict[str, float]
    weight_decay_reference_lr: dict[str, float]
    """Rate that the decoupled weight decay divides the learning rate by."""
    schedule: str
    warmup_tokens: dict[str, int]
    decay_tokens: dict[str, int]
    final_lr_fraction: float
    mlm_probability: float
    global_rope_theta: float
    local_rope_theta: dict[str, float]
    seed: int
    save_every_tokens: dict[str, int]
    configured_batch_warmup: dict[str, int]
    """Tokens. No published run had it, because the original trainer did not read the key."""
    packed: Batching
    padded: Batching


LONG_TOKENS = counts(250 * B, 250 * B, 250 * B, 250 * B, 250 * B, 83_333_000_000)
DECAY_TOKENS = counts(50 * B, 50 * B, 50 * B, 50 * B, 50 * B, 16_666_666_667)
THETA_160K = by_size(*[160_000.0] * 6)

PHASES = {
    "pretrain": Phase(
        tokens=counts(*[1_700 * B] * 6),
        lr=PEAK_LR,
        weight_decay_reference_lr=PEAK_LR,
        schedule="wsd",
        warmup_tokens=counts(4 * B, 4 * B, 3 * B, 3 * B, 2 * B, 2 * B),
        decay_tokens=NOTHING,
        final_lr_fraction=0.02,
        mlm_probability=0.30,
        global_rope_theta=10_000.0,
        local_rope_theta=by_size(*[10_000.0] * 6),
        seed=21,
        save_every_tokens=counts(*[8.5 * B] * 6),
        configured_batch_warmup=counts(125 * B, 100 * B, 75 * B, 50 * B, 10 * B, 3 * B),
        packed=Batching(1_024, 2_816, counts(88, 64, 64, 44, 32, 16)),
        padded=Batching(1_024, 4_608, counts(144, 128, 96, 72, 48, 24)),
    ),
    "extend": Phase(
        tokens=LONG_TOKENS,
        lr=PEAK_LR,
        weight_decay_reference_lr=PEAK_LR,
        schedule="one_minus_sqrt",
        warmup_tokens=NOTHING,
        decay_tokens=LONG_TOKENS,
        final_lr_fraction=0.5,
        mlm_probability=0.30,
        global_rope_theta=160_000.0,
        local_rope_theta={**THETA_160K, "17m": 10_000.0},
        seed=21,
        save_every_tokens=counts(*[8.5 * B] * 6),
        configured_batch_warmup=NOTHING,
        packed=Batching(8_192, 1_024, counts(16, 16, 8, 8, 4, 2)),
        padded=Batching(7_999, 4_608, counts(24, 24, 18, 16, 6, 2)),
    ),
    "decay": Phase(
        tokens=DECAY_TOKENS,
        lr=BASE_LR,
        # the optimizer's groups come from the checkpoint and keep the pretrain peak
        weight_decay_reference_lr=PEAK_LR,
        schedule="one_minus_sqrt",
        warmup_tokens=NOTHING,
        decay_tokens=DECAY_TOKENS,
        final_lr_fraction=0.04,
        mlm_probability=0.15,
        global_rope_theta=160_000.0,
        local_rope_theta=THETA_160K,
        seed=21,
        save_every_tokens=counts(*[8.5 * B] * 6),
        configured_batch_warmup=NOTHING,
        packed=Batching(8_192, 1_024, counts(8, 8, 8, 8, 2, 2)),
        padded=Batching(7_999, 4_608, counts(12, 12, 8, 12, 2, 2)),
    ),
    "cross": Phase(
        tokens=DECAY_TOKENS,
        lr=BASE_LR,
        weight_decay_reference_lr=BASE_LR,
        schedule="wsd",
        warmup_tokens=counts(3 * B, 3 * B, 3 * B, 3 * B, 3 * B, 1 * B),
        decay_tokens=counts(10 * B, 10 * B, 10 * B, 10 * B, 10 * B, 3_333_000_000),
        final_lr_fraction=0.02,
        mlm_probability=0.15,
        global_rope_theta=160_000.0,
        local_rope_theta=THETA_160K,
        seed=210,
        save_every_tokens=counts(10 * B, 10 * B, 10 * B, 10 * B, 10 * B, 3_333_333_333),
        configured_batch_warmup=counts(*[10 * B] * 6),
        packed=Batching(8_192, 1_024, counts(8, 8, 8, 8, 4, 2)),
        padded=Batching(7_999, 4_608, counts(12, 12, 8, 12, 4, 2)),
    ),
}

# Mean number of real tokens of a published pre-training sequence. It follows from the published checkpoints: one every
# 8.5B tokens is one every 2,997.6 steps of 4,608 sequences, and the last one, at 1.7T tokens, is at step 599,525.
ORIGINAL_MEAN_TOKENS = 615.36

# local_attn_rotary_emb_base of the published runs: (phase, objective) -> size -> theta
ORIGINAL_LOCAL_THETA = {
    **{(name, objective): phase.local_rope_theta for name, phase in PHASES.items() for objective in ("mlm", "clm")},
    ("decay", "clm"): by_size(10_000.0, 10_000.0, 10_000.0, 160_000.0, 10_000.0, 160_000.0),
}
