"""The configuration's groups as frozen dataclasses: every key a user may set, its type, unit and default.

Defaults here are those that no recipe table decides; `resolve.py` fills the rest from SIZES, PHASES and OBJECTIVES.
OmegaConf types and merges them, so a key that is not here does not exist. None means "not set"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from megatron_ettin.config.tables import OBJECTIVES

# OmegaConf reads these annotations at run time; on Python 3.10 it wants Optional[...] rather than ... | None.
# ruff: noqa: UP045


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    global_rope_theta: float
    local_rope_theta: float
    max_position_embeddings: int
    vocab_size: int = 50_368
    global_attention_every: int = 3  # layers 0, 3, 6, ... attend to the whole chunk
    encoder_window: int = 64  # keys to each side of a local layer's query
    decoder_window_keys: int = 64  # keys i-63..i, as transformers computes it; 65 is what the original trainer did
    attention_output_dropout: float = 0.1
    init_std: float = 0.02
    output_bias_init: str = "zero"  # or "uniform": between +-1/sqrt(hidden_size), torch's default for a linear layer
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ParallelConfig:
    tp: int = 1
    pp: int = 1
    vp: int = 1  # model chunks a pipeline rank holds (interleaved schedule)
    cp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False  # gradient reduction, weight gathering and transfers between model chunks beside compute
    tp_overlap: bool = False  # tensor parallelism's gathers and scatters beside its products (Transformer Engine)
    pipeline_layers: Optional[str] = None  # layers of each stage in order, "4,3"; None balances them
    recompute: str = "none"  # activations made again in backward: of the modules below, or of whole layers
    recompute_modules: str = "core_attn"  # of selective recomputation: core_attn, mlp or both ("core_attn,mlp")
    recompute_layers: Optional[int] = None  # of full recomputation: so many layers of each stage; None: all
    offload_layers: int = 0  # layers whose activations wait in host memory (Transformer Engine)
    engine: str = "megatron"  # or deepspeed: data parallelism by its ZeRO, around the same tensor-parallel model
    zero_stage: Optional[int] = None  # of deepspeed: 1 cuts the optimizer's state, 2 also gradients, 3 also weights
    zero_offload: str = "none"  # of deepspeed, to host memory: optimizer, or all (with zero_stage=3: weights too)


@dataclass(frozen=True)
class PrecisionConfig:
    name: str = "bf16"
    bf16_first_layers: int = 0  # of an FP8 run: so many layers compute in bf16, as its prediction head always does
    bf16_last_layers: int = 0
    fp8_weights: bool = False  # of an FP8 run: linears' weights live in FP8, and their bytes are what is gathered
    gradients: str = "fp32"  # in which they are summed over micro-batches and ranks; bf16 halves memory and traffic


@dataclass(frozen=True)
class OptimConfig:
    lr: float
    max_lr: float  # weights decay by (lr / max_lr) * weight_decay a step
    weight_decay: float
    name: str = "stable_adamw"
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_grad: float = 0.0  # largest global gradient norm; 0 does not clip
    momentum: float = 0.95  # of muon
    adjust_lr: str = "match_rms_adamw"  # how muon's step depends on a matrix's shape (torch.optim.Muon's adjust_lr_fn)


@dataclass(frozen=True)
class ScheduleConfig:
    name: str
    warmup_tokens: int
    decay_tokens: int
    final_lr_fraction: float
    end_tokens: Optional[int] = None  # where the decay ends; None: at run.tokens


@dataclass(frozen=True)
class DataConfig:
    seq_len: int
    mlm_probability: float
    clm_fraction: Any = None  # of a hybrid run's rows: a share, or TOKENS:SHARE,... with the share linear in between
    mixture: Any = None  # one dataset path, a list of paths or of {path, weight | tokens}, or the YAML file of a list
    root: Optional[str] = None  # where relative dataset paths begin; None: a mixture file's folder, else here
    batching: str = "packed"
    mean_tokens_per_row: Optional[float] = None  # nominal tokens of a row; None: what the datasets' row plans have
    order: str = "keyed"  # or the parquet file or folder of an order to train in
    skip: Optional[str] = None  # rows left out, "FIRST:END" positions of the order, several with commas between
    order_missing: str = "error"  # samples of a given order that no dataset has: "error", or "skip" leaves them out
    validation: Any = None  # what to evaluate on: one dataset path, a list of them, or {name: path, ...}
    workers: Optional[int] = None  # processes of each rank that read ahead; None: 2 on a GPU, 0 (no other) on a CPU
    prefetch: int = 4  # micro-batches that each of them reads ahead
    max_chunks_per_row: Optional[int] = None  # of run.cuda_graph: room for so many; None: one for every 64 tokens
    local_copy: Optional[str] = None  # a folder on each machine's own disk to which the mixture is copied first
    tokenizer: Optional[str] = None  # None: the one the datasets were made with


@dataclass(frozen=True)
class BatchConfig:
    global_batch_rows: int
    micro_batch_rows: int
    warmup_tokens: int
    warmup_min_rows: int
    loss_normalization: str = "global"  # or "microbatch": mean of means, as the original trainer


@dataclass(frozen=True)
class CheckpointConfig:
    every_minutes: Optional[float] = 30.0  # of resumable checkpoints: weights and optimizer; by rank 0's clock
    every_tokens: Optional[int] = None
    every_steps: Optional[int] = None
    keep: int = 3  # newest resumable checkpoints kept; 0 keeps all
    keep_every_tokens: Optional[int] = None  # and one for each multiple of these, for good
    asynchronous: bool = True  # written while training goes on, from a copy in host memory
    on_failure: str = "retry"  # a checkpoint that cannot be written: train on and try again, or stop
    retry_seconds: float = 60.0  # until it is tried again; twice as long each time, up to 16 times
    staging: Optional[str] = None  # a folder on each machine's own disk in which files are written first
    weights_every_tokens: Optional[int] = None  # of milestones: weights alone, all kept


@dataclass(frozen=True)
class MetricsConfig:
    every_steps: int = 1
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "megatron_ettin"
    wandb_group: Optional[str] = None  # None: one for the runs of a size on the same data and seed, so of a pair
    wandb_checkpoints: str = "none"  # or reference, upload: as artifacts
    wandb_report: bool = False  # the page of `ettin report` and its figures as an artifact, once the run is done
    eval_every_steps: Optional[int] = None
    eval_rows: int = 64
    ranks_every_steps: int = 50  # ranks' own seconds are compared, and the slowest is named


@dataclass(frozen=True)
class ResilienceConfig:
    on_nonfinite: str = "skip"  # a loss or gradient norm that is no number: skip the update, stop the run, or ignore it
    on_spike: str = "warn"  # a gradient norm far above the latest steps': tell of it, skip, stop, or look for none
    spike_sigmas: float = 6.0  # how far: its logarithm so many robust standard deviations above their median
    spike_window: int = 128  # of so many latest steps; nothing is a spike before half of them are done
    spike_ratio: float = 5.0  # and the norm itself so many times their median
    max_skips_in_row: int = 8  # of more the run stops
    recheck: bool = False  # run a bad step's forward pass twice: do the bits agree?
    check_replicas_every: Optional[int] = None  # steps between comparisons of the weights that ranks share
    save_on_signal: bool = True  # SIGTERM and SIGUSR1: finish the step, save, exit 75
    in_process_restarts: int = 0  # of all ranks after an error of one, without a new process (nvidia-resiliency-ext)
    hang_seconds: float = 600.0  # the longest a step may take; six times that an evaluation or a save


@dataclass(frozen=True)
class ProfileConfig:
    steps: Optional[str] = None  # A:B traces steps A to B - 1
    ranks: str = "0"  # numbers with commas between, or all
    memory: bool = False  # a snapshot of the GPU's allocations too


@dataclass(frozen=True)
class RunSettings:
    size: str
    objective: str
    phase: str
    tokens: int
    seed: int
    recipe: str = "paired"  # or "original": the choices of the original trainer where ours differ on purpose
    steps: Optional[int] = None  # stop after this many steps, whatever the tokens
    device: str = "auto"
    deterministic: bool = False
    attention: str = "auto"  # the kernel: auto, te-fused, flash, varlen, flex, sdpa (platform/attention.py)
    cuda_graph: bool = False  # forward and backward of a micro-batch recorded once and replayed
    fuse: str = "auto"  # element-wise kernels by torch's compiler: auto (on GPUs), always, never


@dataclass(frozen=True)
class Config:
    """A run, fully resolved."""

    run: RunSettings
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
        """Whether every row is."""
        return OBJECTIVES[self.run.objective].causal

    @property
    def windows(self) -> dict[bool, int]:
        """Of a local layer: keys up to and with the query (True: a causal row), keys to each side (False)."""
        return {True: self.model.decoder_window_keys, False: self.model.encoder_window}


# What one of these keys may be; checked after merging, so that a typo is told with the allowed names.
CHOICES = {
    "run.recipe": ("paired", "original"),
    "model.output_bias_init": ("zero", "uniform"),
    "schedule.name": ("wsd", "one_minus_sqrt", "constant"),
    "optim.name": ("stable_adamw", "adamw", "muon"),
    "optim.adjust_lr": ("match_rms_adamw", "original"),
    "data.batching": ("packed", "padded"),
    "data.order_missing": ("error", "skip"),
    "batch.loss_normalization": ("global", "microbatch"),
    "run.attention": ("auto", "te-fused", "flash", "varlen", "flex", "sdpa"),
    "run.fuse": ("auto", "always", "never"),
    "precision.gradients": ("fp32", "bf16"),
    "run.device": ("auto", "cpu", "gpu"),
    "checkpoint.on_failure": ("retry", "stop"),
    "metrics.wandb_checkpoints": ("none", "reference", "upload"),
    "resilience.on_nonfinite": ("skip", "stop", "ignore"),
    "resilience.on_spike": ("warn", "skip", "stop", "ignore"),
    "parallel.engine": ("megatron", "deepspeed"),
    "parallel.zero_offload": ("none", "optimizer", "all"),
    "parallel.recompute": ("none", "selective", "full"),
}
