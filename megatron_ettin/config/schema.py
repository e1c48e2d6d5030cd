"""Declare the configuration's groups as frozen dataclasses, with every key a user may set.

Each key is declared once by `key` (keys.py), with what it does and which values it may have. docs/config.md is
generated from this module. Keys without a default get it from the recipe's tables (SIZES, PHASES, OBJECTIVES).
OmegaConf types and merges the groups, so it refuses keys that are not declared. None means "not set".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, get_type_hints

from megatron_ettin.config.keys import METADATA, Key, key, science_key
from megatron_ettin.config.operations import (
    CheckpointConfig,
    MetricsConfig,
    ParallelConfig,
    ProfileConfig,
    ResilienceConfig,
)
from megatron_ettin.config.tables import OBJECTIVES, PRECISIONS
from megatron_ettin.config.values import row_ranges, share_points

# OmegaConf reads these annotations at run time; on Python 3.10 it wants Optional[...] rather than ... | None.
# Calls of `key` make fields, as those of dataclasses.field do.
# ruff: noqa: UP045, RUF009


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model and what its layers compute."""

    num_layers: int = science_key("Number of transformer layers.", at_least=1)
    hidden_size: int = science_key("Width of the residual stream.", unit="channels", at_least=1)
    ffn_hidden_size: int = science_key(
        "Inner width of the gated MLP. Its first matrix has twice as many rows.", unit="channels", at_least=1
    )
    num_attention_heads: int = science_key("Number of attention heads.", at_least=1)
    global_rope_theta: float = science_key("Rotary base of global layers.", above=0)
    local_rope_theta: float = science_key("Rotary base of local layers.", above=0)
    max_position_embeddings: int = science_key(
        "Longest row that the model is made for. Equals `data.seq_len` if you set that and not this.",
        unit="tokens",
        at_least=1,
    )
    vocab_size: int = science_key("Number of rows of the embedding.", 50_368, unit="tokens", at_least=1)
    global_attention_every: int = science_key(
        "Every n-th layer uses global attention (3: layers 0, 3, 6).", 3, unit="layers", at_least=1
    )
    encoder_window: int = science_key(
        "Keys to each side of the query that a local layer of a bidirectional row attends to.",
        64,
        unit="tokens",
        at_least=1,
    )
    decoder_window_keys: int = science_key(
        "Keys ending at the query that a local layer of a causal row attends to: 64 as in transformers, 65 as in the"
        " original trainer.",
        64,
        unit="tokens",
        at_least=1,
    )
    attention_output_dropout: float = science_key("Dropout after the attention.", 0.1, at_least=0, below=1)
    init_std: float = science_key("Standard deviation of the initial weights.", 0.02, above=0)
    output_bias_init: str = science_key(
        "Initial bias of the output. `uniform` is between +-1/sqrt(hidden_size), torch's default for a linear layer.",
        "zero",
        choices=("zero", "uniform"),
    )
    norm_eps: float = science_key("Epsilon of the layer norms.", 1e-5, above=0)


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats."""

    name: str = key("Format of weights, activations and matrix products.", "bf16", choices=tuple(PRECISIONS))
    bf16_first_layers: int = key(
        "First layers of an FP8 run that compute in bf16, as its prediction head always does.",
        0,
        unit="layers",
        at_least=0,
    )
    bf16_last_layers: int = key("Last layers of an FP8 run that compute in bf16.", 0, unit="layers", at_least=0)
    fp8_weights: bool = key(
        "Store the weights of an FP8 run's linear layers in FP8 only, and gather these bytes.", False
    )
    gradients: str = key(
        "Format in which gradients are summed over micro-batches and ranks. bf16 halves memory and traffic.",
        "fp32",
        choices=("fp32", "bf16"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    lr: float = science_key("Peak learning rate.", above=0)
    weight_decay_reference_lr: float = science_key(
        "Learning rate that weight_decay is for: weights decay by lr / weight_decay_reference_lr * weight_decay a step."
        " Rescaled with `optim.lr` unless you set it.",
        above=0,
    )
    weight_decay: float = science_key(
        "Share of a weight that is lost in a step whose learning rate is weight_decay_reference_lr. torch multiplies"
        " its coefficient by the learning rate.",
        at_least=0,
        below=1,
    )
    name: str = science_key("Optimizer.", "stable_adamw", choices=("stable_adamw", "adamw", "muon"))
    beta1: float = science_key("Decay of the first moment.", 0.9, at_least=0, below=1)
    beta2: float = science_key("Decay of the second moment.", 0.98, at_least=0, below=1)
    eps: float = science_key("Term in the denominator of the update.", 1e-6, above=0)
    clip_grad: float = science_key(
        "Largest global gradient norm; a larger gradient is scaled down to it.",
        0.0,
        at_least=0,
        zero="no clipping",
        infinite=True,
    )
    momentum: float = science_key("Momentum of muon.", 0.95, at_least=0, below=1)
    adjust_lr: str = science_key(
        "How muon's step depends on a matrix's shape (`adjust_lr_fn` of `torch.optim.Muon`).",
        "match_rms_adamw",
        choices=("match_rms_adamw", "original"),
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run."""

    name: str = science_key("Shape of the schedule.", choices=("wsd", "one_minus_sqrt", "constant"))
    warmup_tokens: int = science_key(
        "Tokens over which the rate rises linearly. Rescaled with the length of the run unless you set it.",
        unit="tokens",
        at_least=0,
    )
    decay_tokens: int = science_key(
        "Last tokens, over which the rate falls. Rescaled with the length of the run unless you set it.",
        unit="tokens",
        at_least=0,
    )
    final_lr_fraction: float = science_key("Rate at the end, as a share of the peak.", at_least=0, at_most=1)
    end_tokens: Optional[int] = science_key(
        "Tokens after which the decay has ended. Not set: `run.tokens`.", None, unit="tokens", at_least=1
    )


@dataclass(frozen=True)
class DataConfig:
    """Data that is read, its order, and how it becomes rows."""

    seq_len: int = science_key("Length of a row.", unit="tokens", at_least=8)
    mlm_probability: float = science_key("Share of tokens that masked rows predict.", at_least=0, at_most=1)
    clm_fraction: Any = science_key(
        "Share of causal rows of a hybrid run: a number, or `[[TOKENS, SHARE], ...]` such as `[[0, 1], [10B, 0.5]]`,"
        " linear between points.",
        None,
        parse=share_points,
    )
    mixture: Any = key(
        "What to train on: a dataset path, a list of paths or of `{path, weight | tokens}`, or the YAML file of one.",
        None,
        path=True,
    )
    root: Optional[str] = key(
        "Folder that relative dataset paths begin at. Not set: the folder of a mixture file, else the current one.",
        None,
        path=True,
    )
    batching: str = science_key(
        "`packed` rows of several chunks without padding, or `padded` sequences of one chunk.",
        "packed",
        choices=("packed", "padded"),
    )
    mean_tokens_per_row: Optional[float] = science_key(
        "Nominal tokens of a row for planning steps and warm-ups. Not set: the mean of the datasets' packing indexes.",
        None,
        unit="tokens",
        above=0,
    )
    order: str = key(
        "`keyed` (a keyed permutation), or the parquet file or folder of a recorded order to train in.",
        "keyed",
        path=True,
        science="in the choice between keyed and recorded; the path may change",
    )
    skip: Optional[list[list[int]]] = science_key(
        "Rows that are left out: `[[FIRST, END], ...]`, order indices from FIRST to END - 1.",
        None,
        parse=row_ranges,
    )
    order_missing: str = key(
        "What to do with samples of a recorded order that no dataset has: stop, or leave them out.",
        "error",
        choices=("error", "skip"),
    )
    validation: Any = key(
        "What to evaluate on: a dataset path, a list of paths, or `{name: path, ...}`.", None, path=True
    )
    workers: Optional[int] = key(
        "Processes of each rank that read ahead. Not set: 2 on a GPU, none on a CPU.", None, at_least=0, zero="none"
    )
    prefetch: int = key("Micro-batches that each worker reads ahead.", 4, unit="micro-batches", at_least=1)
    max_chunks_per_row: Optional[int] = key(
        "Chunks that a captured CUDA graph has room for (`runtime.cuda_graph`). Not set: one for every 64 tokens.",
        None,
        unit="chunks",
        at_least=1,
    )
    local_copy: Optional[str] = key(
        "Folder on each machine's own disk that the mixture is copied to first.", None, path=True
    )
    tokenizer: Optional[str] = key(
        "Without effect: the tokenizer is the one that the datasets were made with. Kept so that older files load.",
        None,
        path=True,
    )


@dataclass(frozen=True)
class BatchConfig:
    """Rows of a step."""

    global_batch_rows: int = science_key(
        "Rows of a step over all ranks. For packed rows rescaled with `data.seq_len` unless you set it.",
        unit="rows",
        at_least=1,
    )
    micro_batch_rows: int = key(
        "Most rows of a micro-batch of one rank. Unless you set it, it is rescaled with `data.seq_len` (packed rows)"
        " and is at most `batch.global_batch_rows`.",
        unit="rows",
        at_least=1,
        science="with loss_normalization=microbatch",
    )
    warmup_tokens: int = science_key(
        "Tokens over which the batch grows to its full size. Rescaled with the length of the run unless you set it.",
        unit="tokens",
        at_least=0,
    )
    warmup_min_rows: int = science_key("Rows of the first step of a batch warm-up.", unit="rows", at_least=1)
    loss_normalization: str = science_key(
        "`global`: the mean over the step's predicted tokens. `microbatch`: the mean of the micro-batches' means, as"
        " in the original trainer.",
        "global",
        choices=("global", "microbatch"),
    )


@dataclass(frozen=True)
class RunSettings:
    """The recipe's run (size, objective, phase), its seed and its length."""

    size: str = key("Published size that the shape is taken from (`--size`).")
    objective: str = science_key("Training objective (`--objective`).")
    phase: str = science_key("Phase of the recipe (`--phase`).")
    tokens: int = key(
        "Length of the run.",
        unit="tokens",
        at_least=1,
        science="where the schedule decays and schedule.end_tokens is not set",
    )
    seed: int = science_key("Seed of initial weights, order, masks and dropout.", at_least=0, at_most=2**63 - 1)
    recipe: str = key(
        "`paired`, or `original`: the choices of the original trainer where ours differ on purpose.",
        "paired",
        choices=("paired", "original"),
    )
    steps: Optional[int] = key("Stop after this many steps, whatever the tokens.", None, unit="steps", at_least=1)


@dataclass(frozen=True)
class RuntimeConfig:
    """Device and kernels of a run. They do not decide what is learned."""

    device: str = key("Device to train on.", "auto", choices=("auto", "cpu", "gpu"))
    deterministic: bool = key("Use only kernels that compute the same bits each time.", False)
    attention: str = key("Attention kernel.", "auto", choices=("auto", "te-fused", "flash", "varlen", "flex", "sdpa"))
    cuda_graph: bool = key("Capture forward and backward of a micro-batch once as a CUDA graph, and replay it.", False)
    compile: str = key(
        "Fuse element-wise kernels with torch's compiler. `auto`: on GPUs.", "auto", choices=("auto", "always", "never")
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, fully resolved."""

    run: RunSettings
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    data: DataConfig
    batch: BatchConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def causal(self) -> bool:
        """Return whether every row is causal."""
        return OBJECTIVES[self.run.objective].causal

    @property
    def windows(self) -> dict[bool, int]:
        """Return the attention window of local layers, in keys, by whether the row is causal.

        `True` has the number of keys ending at the query, `False` the number on each side of it.
        """
        return {True: self.model.decoder_window_keys, False: self.model.encoder_window}

    def value(self, name: str) -> Any:
        """Return the value of a key, such as `run.steps`."""
        group, _, short = name.partition(".")
        return getattr(getattr(self, group), short)

    def with_keys(self, values: Mapping[str, Any]) -> Config:
        """Return a copy with other values of some keys, such as `{"run.steps": 5}`. Nothing is checked."""
        of_groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            group, _, short = name.partition(".")
            of_groups.setdefault(group, {})[short] = value
        groups = {group: dataclasses.replace(getattr(self, group), **keys) for group, keys in of_groups.items()}
        return dataclasses.replace(self, **groups)


@functools.cache
def groups() -> Mapping[str, Any]:
    """Return the dataclass of each group, in the order of `Config`."""
    return get_type_hints(Config)


@functools.cache
def key_types() -> Mapping[str, Any]:
    """Return the type annotation of each `group.key`."""
    return {f"{group}.{name}": hint for group, cls in groups().items() for name, hint in get_type_hints(cls).items()}


@functools.cache
def all_keys() -> Mapping[str, Key]:
    """Return the `Key` (meaning and allowed values) of each `group.key`."""
    return {
        f"{group}.{one.name}": one.metadata[METADATA]
        for group, cls in groups().items()
        for one in dataclasses.fields(cls)
    }


def _decays_to_the_end(config: Config) -> bool:
    schedule = config.schedule
    return schedule.name != "constant" and schedule.decay_tokens > 0 and schedule.end_tokens is None


# keys that are science keys in some runs only
CONDITIONS: dict[str, Callable[[Config], bool]] = {
    # the decay ends at run.tokens
    "run.tokens": _decays_to_the_end,
    # the mean of the micro-batches' means depends on how rows are grouped
    "batch.micro_batch_rows": lambda config: config.batch.loss_normalization == "microbatch",
    "data.order": lambda config: True,
}
# keys that decide which updates are made
GUARD_KEYS = tuple(name for name, key in all_keys().items() if name.startswith("resilience.") and key.science)


def science_keys(config: Config) -> dict[str, object]:
    """Return name -> value of the keys that must not change within a run directory. `data.order` has its kind only."""
    names = [
        name for name, key in all_keys().items() if key.science is True or (key.science and CONDITIONS[name](config))
    ]
    values = {name: config.value(name) for name in names}
    # a recorded order is fixed by the fingerprint of its content, not by the path of its files
    values["data.order"] = "keyed" if config.data.order == "keyed" else "given"
    return values
