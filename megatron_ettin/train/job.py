"""Check everything that needs no other rank before the first run of a job starts.

A job trains one run, or the phases of `ettin train --phase all` (each begins from the one before), or the members of
`--sweep`. A job that was stopped continues with the run in which it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import counted
from megatron_ettin.checkpoint.directory import latest, read_progress
from megatron_ettin.config.schema import Config, RunSettings
from megatron_ettin.data.blended_dataset import BlendedDataset, open_run_dataset
from megatron_ettin.data.mixture import resolve_mixture
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.plan.schedule_end import fit_schedule, free_by_value
from megatron_ettin.runs import launches
from megatron_ettin.runs.directory import RunDirectory
from megatron_ettin.runs.launches import check_roll_back
from megatron_ettin.train.progress import Progress, is_done


@dataclass(frozen=True)
class TrainArgs:
    """Arguments of `ettin train` besides the configuration."""

    run_dir: Path
    init_from: Path | None = None
    """Run or checkpoint that the run begins from."""
    keep_optimizer: bool | None = None
    """Whether the optimizer's state of `init_from` is kept; None: by the rule of `resume.keeps_optimizer`."""
    allow_change: Sequence[str] = ()
    """Science keys that may change in a run that has begun."""
    from_step: int | None = None
    """Step to load from `init_from`; without `init_from`, the step that the run goes back to."""
    inherited_model_keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `model` that came with `init_from`."""
    json_stream: TextIO | None = None
    """Stream that gets steps as JSON lines, instead of the lines for people."""
    rescaled_keys: frozenset[str] | None = None
    """Schedule keys to rescale to the run's length. None: those that still have the recipe's value."""
    unused_overrides: Sequence[str] = ()
    """A line for each override that the run does not read, logged when it starts."""


@dataclass(frozen=True)
class TrainJob:
    """One run, checked as far as is possible without the other ranks."""

    config: Config
    args: TrainArgs
    corpus: BlendedDataset
    changes: list[str]
    """Science keys that change in a run that has begun, as allowed."""


def prepare_jobs(runs: Sequence[tuple[Config, TrainArgs]], is_sweep: bool = False) -> list[TrainJob]:
    """Check the runs that are left to train, and return them in order. Raises UserError.

    Args:
        runs: The members of a sweep, or phases in order: each but the first begins from the run directory of the one
            before. The last phase is kept even if it is finished.
        is_sweep: Whether they are the members of a sweep.
    """
    left = list(runs)
    if is_sweep:
        left = [(config, args) for config, args in runs if not is_finished(config.run, args.run_dir)]
    while not is_sweep and len(left) > 1 and is_finished(left[0][0].run, left[0][1].run_dir):
        left.pop(0)
    return [prepare_job(config, args) for config, args in left]


def prepare_job(config: Config, args: TrainArgs) -> TrainJob:
    """Open the data and check the run directory. Raises UserError."""
    config = dataclasses.replace(config, data=resolve_mixture(config.data))
    corpus = open_training_data(config)
    config = with_schedule(cap_steps_to_order(config, corpus), args, corpus)
    if args.from_step is not None and args.init_from is None:
        check_roll_back(args.run_dir, args.from_step, config.data.skip)
    launches.check_writable(args.run_dir)
    if config.checkpoint.staging is not None:
        launches.check_writable(Path(config.checkpoint.staging), "checkpoint.staging: ")
    changes = launches.check_unchanged(args.run_dir, config, corpus, args.allow_change)
    return TrainJob(config, args, corpus, changes)


def open_training_data(config: Config) -> BlendedDataset:
    """Open the run's dataset. Raises UserError if a part is missing or its vocabulary is not the model's."""
    corpus = open_run_dataset(config)
    corpus.check_vocabulary(config.model.vocab_size)
    return corpus


def cap_steps_to_order(config: Config, corpus: BlendedDataset) -> Config:
    """Return the config with the number of steps in its `data.order` as `run.steps`, unless that is set.

    Raises UserError if `run.steps` is greater, or the order has fewer rows than one step.
    """
    if corpus.row_limit is None:
        return config
    steps = BatchSizes.of(config.batch, corpus.mean_tokens_per_row).steps_within(corpus.row_limit)
    if steps == 0:
        rows = counted(corpus.row_limit, "row")
        raise UserError(f"data.order: {config.data.order} has {rows}, fewer than the first step needs")
    if config.run.steps is not None and config.run.steps > steps:
        raise UserError(
            f"run.steps: {config.run.steps:,}, but data.order {config.data.order} ends with step {steps:,}"
            f" ({counted(corpus.row_limit, 'row')})"
        )
    return config.with_keys({"run.steps": config.run.steps or steps})


def with_schedule(config: Config, args: TrainArgs, corpus: BlendedDataset) -> Config:
    """Return the config with its schedule rescaled to the run; a started run keeps its recorded schedule."""
    keys = free_by_value(config) if args.rescaled_keys is None else args.rescaled_keys
    begun = RunDirectory(args.run_dir).recorded_config
    if begun:
        return config.with_keys({key: begun.value(key) for key in keys})
    return fit_schedule(config, keys, corpus.mean_tokens_per_row)


def saved_progress(run_dir: Path) -> Progress | None:
    """Return the progress of a run's newest checkpoint; None if there is none. Raises UserError."""
    newest = latest(run_dir) if (run_dir / "checkpoints").is_dir() else None
    return None if newest is None else Progress.restored(read_progress(newest))


def is_finished(settings: RunSettings, run_dir: Path) -> bool:
    """Return whether a run's newest checkpoint has trained all that the run is to train. Raises UserError."""
    saved = saved_progress(run_dir)
    return saved is not None and is_done(settings, saved)
