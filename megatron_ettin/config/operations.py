"""Declare the configuration groups for operating a run: layout, checkpoints, metrics, failures, profiles.

Only `resilience.on_*` and `resilience.spike_*` decide what is learned. schema.py explains how keys are declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_ettin.config.keys import key, science_key
from megatron_ettin.config.values import names, rank_list, step_span, whole_numbers

# OmegaConf reads these annotations at run time; on Python 3.10 it wants Optional[...] rather than ... | None.
# Calls of `key` make fields, as those of dataclasses.field do.
# ruff: noqa: UP045, RUF009


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the model and the batch over ranks."""

    tp: int = key("Tensor-parallel ranks.", 1, at_least=1)
    pp: int = key("Pipeline stages.", 1, at_least=1)
    vpp: int = key("Model chunks that a pipeline rank holds (interleaved schedule).", 1, at_least=1)
    cp: int = key("Context-parallel ranks.", 1, at_least=1)
    sequence_parallel: bool = key("Shard activations between tensor-parallel regions. Needs tp of 2 or more.", False)
    distributed_optimizer: bool = key("Shard the optimizer state over data-parallel ranks.", True)
    overlap: bool = key(
        "Overlap gradient reduction, weight gathering and transfers between model chunks with compute.", False
    )
    tp_overlap: bool = key(
        "Overlap the gathers and scatters of sequence parallelism with matrix products (Transformer Engine).", False
    )
    pipeline_layers: Optional[list[int]] = key(
        "Layers of each pipeline stage in order, such as `[4, 3]`. Not set: stages of equal work.",
        None,
        parse=whole_numbers,
    )
    recompute: str = key(
        "Activations that backward computes again: those of some modules, or those of whole layers.",
        "none",
        choices=("none", "selective", "full"),
    )
    recompute_modules: list[str] = key(
        "Modules of selective recomputation: one or both of `core_attn` and `mlp`.", ["core_attn"], parse=names
    )
    recompute_layers: Optional[int] = key(
        "Layers of each stage that full recomputation recomputes. Not set: all.", None, unit="layers", at_least=1
    )
    offload_layers: int = key(
        "Layers whose activations are kept in host memory until backward (Transformer Engine).",
        0,
        unit="layers",
        at_least=0,
        zero="none",
    )
    engine: str = key(
        "Who does data parallelism: Megatron-Core, or DeepSpeed's ZeRO around the same tensor-parallel model.",
        "megatron",
        choices=("megatron", "deepspeed"),
    )
    zero_stage: Optional[int] = key(
        "DeepSpeed only. 1 shards the optimizer state, 2 also gradients, 3 also weights. Not set: 2.", None
    )
    zero_offload: str = key(
        "DeepSpeed only. Keep the optimizer state in host memory; `all` (with zero_stage=3) the weights too.",
        "none",
        choices=("none", "optimizer", "all"),
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Times at which checkpoints are written, and which are kept. Resumable ones hold weights and optimizer state."""

    every_minutes: Optional[float] = key(
        "Time between resumable checkpoints, by rank 0's clock.", 30.0, unit="minutes", above=0
    )
    every_tokens: Optional[int] = key("Tokens between resumable checkpoints.", None, unit="tokens", at_least=1)
    every_steps: Optional[int] = key("Steps between resumable checkpoints.", None, unit="steps", at_least=1)
    keep: int = key("Newest resumable checkpoints that are kept.", 3, at_least=0, zero="keep all")
    keep_every_tokens: Optional[int] = key(
        "Keep one resumable checkpoint permanently for each multiple of this many tokens.",
        None,
        unit="tokens",
        at_least=1,
    )
    asynchronous: bool = key("Write in the background, from a copy in host memory.", True)
    on_failure: str = key(
        "What to do when a checkpoint cannot be written: train on and try again, or stop.",
        "retry",
        choices=("retry", "stop"),
    )
    retry_seconds: float = key(
        "Time until a failed checkpoint is tried again. It doubles each time, up to 16 times.",
        60.0,
        unit="seconds",
        above=0,
        infinite=True,
    )
    staging: Optional[str] = key("Folder on each machine's own disk that files are written in first.", None, path=True)
    weights_every_tokens: Optional[int] = key(
        "Tokens between milestones: weights only, all kept.", None, unit="tokens", at_least=1
    )


@dataclass(frozen=True)
class MetricsConfig:
    """Figures that are measured, how often, and their destinations besides metrics.jsonl."""

    every_steps: int = key("Steps between lines on the console and in dashboards.", 1, unit="steps", at_least=1)
    tensorboard: bool = key("Write TensorBoard files.", True)
    wandb: bool = key("Log to Weights & Biases.", False)
    wandb_project: str = key("Project of Weights & Biases.", "megatron_ettin")
    wandb_group: Optional[str] = key(
        "Group of Weights & Biases. Not set: one for the runs of a size on the same data and seed, so for a pair.", None
    )
    wandb_checkpoints: str = key(
        "Log checkpoints as artifacts: their paths, or their files.", "none", choices=("none", "reference", "upload")
    )
    wandb_report: bool = key("Log the page of `ettin report` as an artifact once the run is done.", False)
    eval_every_steps: Optional[int] = key(
        "Steps between evaluations. Not set: at the end of the run only.", None, unit="steps", at_least=1
    )
    eval_rows: int = key("Rows of each validation dataset that are evaluated.", 64, unit="rows", at_least=1)
    ranks_every_steps: int = key(
        "Steps between comparisons of the ranks' own times, in which the slowest is named.",
        50,
        unit="steps",
        at_least=1,
    )


@dataclass(frozen=True)
class ResilienceConfig:
    """Reactions to a step, a rank or a job that goes wrong."""

    on_nonfinite: str = science_key(
        "What to do with a loss or gradient norm that is not finite: skip the update, stop the run, or ignore it.",
        "skip",
        choices=("skip", "stop", "ignore"),
    )
    on_spike: str = science_key(
        "What to do with a gradient norm far above the latest ones: warn, skip the update, stop the run, or not look.",
        "warn",
        choices=("warn", "skip", "stop", "ignore"),
    )
    spike_sigmas: float = science_key(
        "A spike's log gradient norm lies more than this many robust standard deviations above the median.",
        6.0,
        above=0,
        infinite=True,
    )
    spike_window: int = science_key(
        "Latest steps that a spike is judged by. No step counts as a spike until half the window is filled.",
        128,
        unit="steps",
        at_least=4,
    )
    spike_ratio: float = science_key("A spike is also more than this many times the median.", 5.0, at_least=1)
    max_skips_in_row: int = key(
        "Stop the run after more than this many skipped updates in a row.",
        8,
        unit="steps",
        at_least=0,
        zero="the first one stops the run",
    )
    recheck: bool = key("Compute the forward pass of a bad step twice more and compare the bits.", False)
    check_replicas_every: Optional[int] = key(
        "Steps between comparisons of the weights that ranks share.", None, unit="steps", at_least=1
    )
    save_on_signal: bool = key("On SIGTERM and SIGUSR1 finish the step, save, and exit with 75.", True)
    hang_seconds: float = key(
        "Longest time that a step may take. An evaluation or a save may take six times that.",
        600.0,
        unit="seconds",
        at_least=1,
        below=1e7,
    )


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of the profiler."""

    steps: Optional[list[int]] = key(
        "Steps to trace: `[5, 8]` traces steps 5 to 7. At most 50.", None, unit="steps", parse=step_span
    )
    ranks: Optional[list[int]] = key("Ranks that trace. `null` or `all`: every rank.", [0], parse=rank_list)
    memory: bool = key("Write a snapshot of the GPU's allocations too.", False)

    @property
    def step_range(self) -> range:
        """Return the steps to trace, counted from 1; empty if none are."""
        return range(*self.steps) if self.steps else range(0)
