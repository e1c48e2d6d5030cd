"""Format the lines that a run logs when it starts and ends, and its entry in history.jsonl."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.base.text import counted
from megatron_ettin.checkpoint.directory import list_checkpoints
from megatron_ettin.config.layouts import describe_empty_rows
from megatron_ettin.config.schema import Config, RunSettings
from megatron_ettin.config.tables import long_name, short_name
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.data.mixture import describe_epochs, epoch_warnings
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.faults.anomalies import start_note
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.plan.schedule_end import describe_end
from megatron_ettin.platform.device import gpu_count
from megatron_ettin.runs import launches
from megatron_ettin.train.hooks.base import Run
from megatron_ettin.train.job import TrainJob, saved_progress
from megatron_ettin.train.progress import Progress, is_done


def log_start(run: Run, job: TrainJob, env: DistributedEnv, origin: str) -> None:
    """Log a run's model, data, schedule, devices and origin, and write the launch to its run directory (rank 0 only).

    `origin` is the text that `resume.begin` returns.
    """
    config, train_state, platform = run.config, run.train_state, run.train_state.platform
    backend = train_state.model_chunks[0].config.backend
    log_data(config, job.corpus)
    log_info(f"schedule: {describe_end(config, job.corpus.mean_tokens_per_row)}")
    log_info(
        f"{config.run.objective} {short_name(config.run.size, config.model)} {config.run.phase}:"
        f" {long_name(config.run.size, config.model)}, {config.precision.name},"
        f" {counted(env.world, 'rank')} on {platform.name} ({train_state.layout.topology}),"
        f" {backend.name} layers; {origin}"
    )
    if left := describe_empty_rows(config, train_state.layout.topology.dp):
        log_info(f"batch: {left}")
    assert train_state.optimizer is not None
    notes = (
        start_note(config.resilience, config.parallel.engine, train_state.optimizer.can_skip),
        launches.guard_rule_note(run.directory, config.resilience),
    )
    for note in notes:
        if note is not None:
            log_info(note)
    log_info(f"attention by {backend.attention.name} ({backend.attention.why})")
    gpus = gpu_count() if platform.is_gpu else 0
    if env.source == "alone" and gpus > 1:
        log_info(
            f"this machine has {gpus} GPUs and one is used; to use all:"
            f" torchrun --nproc-per-node {gpus} --no-python ettin train ..."
        )
    if os.cpu_count() and not platform.is_gpu and "OMP_NUM_THREADS" not in os.environ and env.world > 1:
        log_info(f"OMP_NUM_THREADS is not set; every rank uses {torch.get_num_threads()} threads")
    for line in job.args.unused_overrides:
        log_info(line)
    record = {
        "from": origin,
        "changes": job.changes,
        "layout": str(train_state.layout.topology),
        "world": env.world,
        "device": platform.name,
        "attention": backend.attention.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step": run.progress.step,
    }
    args = job.args
    record |= launches.origin(args.run_dir, args.init_from, args.from_step, args.inherited_model_keys)
    launches.write_launch(args.run_dir, config, job.corpus, record)


def log_data(config: Config, corpus: BlendedDataset) -> None:
    """Log the datasets of a run, how many epochs of each it reads, and warnings about that."""
    sizes, run = BatchSizes.of(config.batch, corpus.mean_tokens_per_row), config.run
    tokens = run.tokens
    if run.steps is not None:
        tokens = min(tokens, round(sizes.rows_before(run.steps) * corpus.mean_tokens_per_row))
    table = corpus.epochs(tokens)
    log_info(*describe_epochs(table))
    if corpus.row_limit is not None:
        span = f"{counted(corpus.row_limit, 'row')}, {counted(sizes.steps_within(corpus.row_limit), 'step')}"
        left = f", {counted(skipped, 'sample')} left out" if (skipped := corpus.skipped_samples) else ""
        log_info(f"order of {config.data.order}: {span}{left}; the run ends with them")
    for line in epoch_warnings(table):
        log_warning(line)


def complete_line(settings: RunSettings, run_dir: Path) -> str | None:
    """Return the log line for a run that has nothing left to train; None if something is left or cannot be read."""
    try:
        saved = saved_progress(run_dir)
    except UserError:
        return None
    if saved is None or not is_done(settings, saved):
        return None
    behind = ""
    if settings.steps is not None and settings.steps < saved.step:
        behind = f", and run.steps={settings.steps} is behind its step {saved.step:,}"
    return (
        f"{run_dir}: complete by its record{behind}; nothing is left to train (run.tokens or run.steps would have to be"
        " more)"
    )


def ending_lines(settings: RunSettings, run_dir: Path, progress: Progress, loss: float | None) -> list[str]:
    """Return the lines for the end of a run: its result and the next command.

    Args:
        settings: Length of the run.
        run_dir: Run directory.
        progress: Progress at the end.
        loss: Loss of the last step; None if this launch trained no step.
    """
    done = is_done(settings, progress)
    saved = list_checkpoints(run_dir)
    parts = [f"{run_dir}: {'complete' if done else 'stopped'} at step {progress.step:,}", f"{progress.tokens:,} tokens"]
    parts += [] if loss is None else [f"loss {loss:.4f}"]
    parts.append(f"checkpoint {saved[-1]}" if saved else "no checkpoint")
    if done:
        following = f"next: ettin report {run_dir}; ettin convert to-hf {run_dir} OUT"
    else:
        following = "next: the same command goes on from there"
    return [", ".join(parts), following]
