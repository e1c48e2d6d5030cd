"""The training loop and the command behind `ettin train`: resolve, check, assemble, go on from where the run stands,
step until the phase's tokens are trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.base.text import counted
from megatron_ettin.batching.batches import Batches
from megatron_ettin.batching.loader import Loader, worker_count
from megatron_ettin.config.layouts import describe_empty_rows
from megatron_ettin.config.resolve import keep_begun
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import OBJECTIVES, long_name, short_name
from megatron_ettin.config.values import validation_sets
from megatron_ettin.data.blended_dataset import BlendedDataset, open_run_dataset
from megatron_ettin.data.local_copy import local_corpus
from megatron_ettin.data.mixture import describe_epochs, epoch_warnings, resolve_mixture
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.evaluate.evaluation import build_eval_dataset
from megatron_ettin.faults import skipped_steps
from megatron_ettin.faults.anomalies import start_note
from megatron_ettin.faults.consistency import check_ranks_consistent
from megatron_ettin.faults.hang_report import RankInfo
from megatron_ettin.faults.sdc import WeightHashCheck, replay_check
from megatron_ettin.faults.skipped_steps import BadNumbers, TrainingStopped
from megatron_ettin.faults.stragglers import Stragglers
from megatron_ettin.faults.watchdog import Watchdog, collective_seconds
from megatron_ettin.optim.schedule import lr_fraction
from megatron_ettin.parallel.env import DistributedEnv, read_distributed_env
from megatron_ettin.parallel.failure_report import Heartbeat, end_now, exit_with_parent, report_folder
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import (
    abort_process_group,
    destroy_process_group,
    init_process_group,
    release_store,
)
from megatron_ettin.plan.schedule_end import describe_end, fit_schedule, free_by_value
from megatron_ettin.platform import Platform, detect
from megatron_ettin.platform.device import gpu_count
from megatron_ettin.runs import directory
from megatron_ettin.runs.rollback import check_roll_back
from megatron_ettin.train import resume
from megatron_ettin.train.hooks.base import Evaluation, GarbageCollection, Hook, Metrics, Run
from megatron_ettin.train.hooks.checkpointing import Checkpoints, DirectoryCheck
from megatron_ettin.train.hooks.console import Console, complete_line, ending_lines
from megatron_ettin.train.hooks.profiling import Profiling
from megatron_ettin.train.progress import Progress, is_done
from megatron_ettin.train.setup import TrainState, setup_training
from megatron_ettin.train.step import StepInfo, train_step
from megatron_ettin.train.stop_signal import StopSignal

RENDEZVOUS_SECONDS = 600.0
COPY_SECONDS = 7_200.0  # machines may differ by so much in copying the data


@dataclass(frozen=True)
class TrainArgs:
    """What `ettin train` was told besides the configuration."""

    run_dir: Path
    init_from: Path | None = None
    keep_optimizer: bool | None = None  # None: by the rule of `resume.keeps_optimizer`
    allow_change: Sequence[str] = ()
    from_step: int | None = None  # of `init_from`, or of the run itself, which goes back to it
    model_of_weights: Mapping[str, Any] = field(default_factory=dict)  # keys of `model` that came with `init_from`
    json_stream: TextIO | None = None  # where steps are told as JSON lines, instead of to people
    free: frozenset[str] | None = None  # keys of the schedule that follow the run's length; None: by their values
    unread: Sequence[str] = ()  # a line for each override that the run does not read, printed once it starts


def train(run: Run, hooks: Sequence[Hook], stop: StopSignal) -> bool:
    """Step until the run is done; True if it was asked to stop before. Every rank returns the same."""
    try:
        with run.closing:
            return _train(run, hooks, stop)
    except BadNumbers as bad:
        told = f"; {skipped_steps.way_back(run.directory, run.progress)}" if run.is_main_process else ""
        raise BadNumbers(f"{bad}{told}") from None


def _train(run: Run, hooks: Sequence[Hook], stop: StopSignal) -> bool:
    stop.begun = True
    for hook in hooks:
        hook.start(run)
    stopped, loss = is_done(run.config, run.progress), None
    with contextlib.closing(open_loader(run)) as loader:
        while not stopped:
            step, tokens = run.progress.step, run.progress.tokens
            lr = run.config.optim.lr * lr_fraction(tokens, run.config.schedule, run.config.run.tokens)
            guard = run.guard
            info = train_step(
                run.train_state, run.batches, step, tokens, lr, stop.received, loader.step(step), guard, run.request
            )
            progress = run.progress.after(info, guard)
            if info.bad is not None:
                after_bad_step(run, info, progress)
            run.progress, loss = progress, info.loss
            run.heartbeat.step(step=info.step, tokens=info.tokens)
            for hook in hooks:
                hook.step(run, info)
            stopped = info.stop_requested or is_done(run.config, run.progress)
    for hook in reversed(hooks):  # the last checkpoint is told to those that then close
        hook.stop(run)
    done, left_out = is_done(run.config, run.progress), run.progress.skipped_in_row
    if done and left_out:
        last = "step" if left_out == 1 else f"{left_out} steps"
        raise BadNumbers(f"the run ends with the updates of its last {last} left out; nothing of them was saved")
    if run.is_main_process:
        log_info(*ending_lines(run.config, run.directory, run.progress, loss))
    return not done


def open_loader(run: Run) -> Loader:
    """The micro-batches of this rank from where the run stands to its end."""
    data, is_gpu = run.config.data, run.train_state.platform.is_gpu
    workers, end = worker_count(data.workers, is_gpu), run.config.run.steps
    return Loader(run.batches.host, run.progress.step, end, workers, data.prefetch, pinned=is_gpu)


def after_bad_step(run: Run, info: StepInfo, progress: Progress) -> None:
    """Tell of it and, where asked for, tell data from machine. Every rank has the same figures: where the run is to end
    all of them raise, before anything of the step is kept."""
    if run.config.resilience.recheck:
        run.heartbeat.enter("computing a step again")
        found = replay_check(run.train_state, run.batches, info.step - 1)
        if run.is_main_process:
            log_warning(f"step {info.step}: {found}")
    skipped_steps.report_anomaly(run.directory, run.config, run.batches.corpus, info, progress, run.is_main_process)


@dataclass(frozen=True)
class TrainJob:
    """One phase, checked as far as that goes without the other ranks. `changes`: science keys that may change."""

    config: Config
    launch: TrainArgs
    corpus: BlendedDataset
    changes: list[str]


def prepare(config: Config, launch: TrainArgs) -> TrainJob:
    """Open the data, check the run directory. Raises UserError."""
    config = dataclasses.replace(config, data=resolve_mixture(config.data))
    corpus = open_training_data(config)
    config = with_schedule(cap_steps_to_order(config, corpus), launch, corpus)
    if launch.from_step is not None and launch.init_from is None:
        check_roll_back(launch.run_dir, launch.from_step, config.data.skip)
    directory.check_writable(launch.run_dir)
    if config.checkpoint.staging is not None:
        directory.check_writable(Path(config.checkpoint.staging), "checkpoint.staging: ")
    changes = directory.check_unchanged(launch.run_dir, config, corpus, launch.allow_change)
    return TrainJob(config, launch, corpus, changes)


def run_training(config: Config, launch: TrainArgs) -> bool:
    """Train as this process's rank; True if the run was saved before its end and wants requeueing."""
    return run_jobs([prepare(config, launch)])


def run_jobs(jobs: Sequence[TrainJob], each_alone: bool = False) -> bool:
    """Train one job after another as this process's rank; True if the last one run was saved before its end.

    `each_alone`: one that cannot go on (TrainingStopped) is told of and the next begins."""
    place = read_distributed_env()
    if place.source != "alone":
        exit_with_parent()
    first = jobs[0].config
    platform = detect(first.run.device, place.local_rank)
    if first.run.deterministic:
        platform.make_deterministic()
    stop = StopSignal(first.resilience.save_on_signal, tells=place.local_rank == 0)
    heartbeat = Heartbeat(report_folder() if place.rank == 0 else None, first.resilience.hang_seconds)
    try:
        for job in jobs:
            try:
                if _run_job(job, place, platform, stop, heartbeat):
                    heartbeat.enter("stopped")
                    return True  # the others were asked to stop too
            except TrainingStopped as stopped:
                if not each_alone:
                    raise
                if place.rank == 0:
                    log_warning(f"{job.launch.run_dir}: {stopped}")
        heartbeat.enter("done")
        return False
    finally:
        stop.close()
        release_store()


def _run_job(job: TrainJob, place: DistributedEnv, platform: Platform, stop: StopSignal, heartbeat: Heartbeat) -> bool:
    """One job; True if it was stopped before its end."""
    if stop.received:
        return True
    stop.begun = False
    with directory.locked(job.launch.run_dir, is_main_process=place.rank == 0):
        if place.rank == 0 and (line := complete_line(job.config, job.launch.run_dir)):
            log_info(line)
        folder = job.config.data.local_copy
        heartbeat.hang_seconds = job.config.resilience.hang_seconds
        heartbeat.enter("starting", None if folder is None else COPY_SECONDS)
        read = job.corpus if folder is None else local_corpus(job.corpus, folder)
        arrival = RENDEZVOUS_SECONDS if folder is None else COPY_SECONDS
        init_process_group(place, platform, collective_seconds(heartbeat.hang_seconds), arrival)
        heartbeat.enter("starting")
        return _train_as(place, job, read, platform, stop, heartbeat)


def _train_as(
    place: DistributedEnv,
    job: TrainJob,
    read: BlendedDataset,
    platform: Platform,
    stop: StopSignal,
    heartbeat: Heartbeat,
) -> bool:
    """This rank's run, from assembly to the last save; core's groups are gone afterwards. `read`: the corpus or its
    copy on this machine."""
    try:
        with Watchdog(job.launch.run_dir, heartbeat, place.rank) as watchdog:
            return _train_watched(place, job, read, platform, stop, watchdog)
    finally:
        destroy_process_group()  # where it came to no watchdog


def _train_watched(
    place: DistributedEnv, job: TrainJob, read: BlendedDataset, platform: Platform, stop: StopSignal, watchdog: Watchdog
) -> bool:
    """The part of it that may stall. An error that a stall brought about ends the process as the stall did."""
    config, launch, corpus, train_state, heartbeat = job.config, job.launch, job.corpus, None, watchdog.heartbeat
    try:
        check_ranks_consistent(config, corpus)
        train_state = setup_training(config, platform, place.world)
        train_state.clock.heartbeat = heartbeat
        progress, origin = resume.begin(
            train_state,
            launch.run_dir,
            launch.init_from,
            launch.keep_optimizer,
            corpus,
            launch.from_step,
            launch.allow_change,
        )
        batches = Batches.of(config, read, train_state.layout, platform.device)
        directory.check_reader(config, corpus, batches.corpus)
        directory.check_skips(launch.run_dir, corpus, batches.sizes.rows_before(progress.step))
        run = Run(train_state, batches, launch.run_dir, progress, heartbeat)
        heartbeat.enter("first step", step=progress.step, saved_step=progress.step)
        if run.is_main_process:
            log_run(run, place, origin, corpus)
            for line in launch.unread:
                log_info(line)
            record = {
                "from": origin,
                "changes": job.changes,
                "layout": str(train_state.layout.topology),
                "world": place.world,
                "device": platform.name,
                "attention": train_state.model_chunks[0].config.backend.attention.name,
            }
            threads = {"threads": torch.get_num_threads(), "torch": torch.__version__, "step": progress.step}
            began = directory.origin(launch.run_dir, launch.init_from, launch.from_step, launch.model_of_weights)
            directory.write_launch(launch.run_dir, config, corpus, {**record, **threads, **began})
        return train(run, build_hooks(run, watchdog.peers, launch.json_stream), stop)
    except Exception as error:
        watchdog.explain()
        if platform.is_gpu and place.world > 1 and not isinstance(error, (UserError, TrainingStopped)):
            # the others wait for this rank in a kernel; so would it for them, taking the groups down
            if not config.resilience.in_process_restarts:
                end_now(error)
            abort_process_group()
        raise
    finally:
        if train_state is not None:
            train_state.close()
        destroy_model_parallel()
        destroy_process_group()


def build_hooks(run: Run, peers: Sequence[RankInfo], json_stream: TextIO | None = None) -> list[Hook]:
    """In the order they run: evaluation adds figures that the metrics then write, checkpoints come last."""
    hooks: list[Hook] = [GarbageCollection(), Stragglers(peers), Metrics(), Console(json_stream)]
    if run.config.data.validation is not None:
        sets = validation_sets(run.config.data.validation)
        kinds = OBJECTIVES[run.config.run.objective].row_objectives
        held_out = [build_eval_dataset(run.train_state, sets, kind) for kind in reversed(kinds)]
        for batches in held_out[0].sources.values():
            if batches.corpus.tokenizer_fingerprint != run.batches.corpus.tokenizer_fingerprint:
                path = batches.corpus.datasets[0].path
                raise UserError(f"data.validation: {path} was made with another tokenizer than the data")
        hooks.insert(0, Evaluation(held_out))
    return [*hooks, WeightHashCheck(), Checkpoints(hooks), DirectoryCheck(), Profiling()]


def open_training_data(config: Config) -> BlendedDataset:
    """The corpus of the run. Raises UserError for what is missing or made with another tokenizer."""
    corpus = open_run_dataset(config)
    if config.model.vocab_size != corpus.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size}, but the dataset's tokenizer has {corpus.vocab_size} entries;"
            f" set model.vocab_size={corpus.vocab_size} or prepare the data with the model's tokenizer"
        )
    return corpus


def cap_steps_to_order(config: Config, corpus: BlendedDataset) -> Config:
    """The run, with `run.steps` no later than a given order ends. Raises UserError where it was told to go beyond."""
    if corpus.end is None:
        return config
    steps = BatchSizes.of(config.batch, corpus.mean_tokens_per_row).steps_within(corpus.end)
    if steps == 0:
        rows = counted(corpus.end, "row")
        raise UserError(f"data.order: {config.data.order} has {rows}, fewer than the first step needs")
    if config.run.steps is not None and config.run.steps > steps:
        raise UserError(
            f"run.steps: {config.run.steps:,}, but data.order {config.data.order} ends with step {steps:,}"
            f" ({counted(corpus.end, 'row')})"
        )
    return config.with_keys({"run.steps": config.run.steps or steps})


def with_schedule(config: Config, launch: TrainArgs, corpus: BlendedDataset) -> Config:
    """Return the run with a schedule in proportion to where it ends; one that has begun keeps its own."""
    free = free_by_value(config) if launch.free is None else launch.free
    begun = directory.recorded(launch.run_dir)
    return keep_begun(config, begun, free) if begun else fit_schedule(config, free, corpus.mean_tokens_per_row)


def log_data(config: Config, corpus: BlendedDataset) -> None:
    """What the run reads, and how often."""
    sizes, run = BatchSizes.of(config.batch, corpus.mean_tokens_per_row), config.run
    tokens = run.tokens
    if run.steps is not None:
        tokens = min(tokens, round(sizes.rows_before(run.steps) * corpus.mean_tokens_per_row))
    table = corpus.epochs(tokens)
    log_info(*describe_epochs(table))
    if corpus.end is not None:
        span = f"{counted(corpus.end, 'row')}, {counted(sizes.steps_within(corpus.end), 'step')}"
        left = f", {counted(skipped, 'sample')} left out" if (skipped := corpus.skipped_samples) else ""
        log_info(f"order of {config.data.order}: {span}{left}; the run ends with them")
    for line in epoch_warnings(table):
        log_warning(line)


def log_run(run: Run, place: DistributedEnv, origin: str, corpus: BlendedDataset) -> None:
    config, train_state = run.config, run.train_state
    log_data(config, corpus)
    log_info(f"schedule: {describe_end(config, corpus.mean_tokens_per_row)}")
    named = short_name(config.run.size, config.model), long_name(config.run.size, config.model)
    log_info(
        f"{config.run.objective} {named[0]} {config.run.phase}: {named[1]},"
        f" {config.precision.name},"
        f" {counted(place.world, 'rank')} on {train_state.platform.name} ({train_state.layout.topology}),"
        f" {train_state.model_chunks[0].config.backend.name} layers; {origin}"
    )
    if left := describe_empty_rows(config, train_state.layout.topology.dp):
        log_info(f"batch: {left}")
    assert train_state.optimizer is not None
    for note in (start_note(config, train_state.optimizer.can_skip), directory.told_of_guard(run.directory, config)):
        if note is not None:
            log_info(note)
    attention = train_state.model_chunks[0].config.backend.attention
    log_info(f"attention by {attention.name} ({attention.why})")
    gpus = gpu_count() if train_state.platform.is_gpu else 0
    if place.source == "alone" and gpus > 1:
        log_info(
            f"this machine has {gpus} GPUs and one is used; to use all:"
            f" torchrun --nproc-per-node {gpus} --no-python ettin train ..."
        )
    if os.cpu_count() and not train_state.platform.is_gpu and "OMP_NUM_THREADS" not in os.environ and place.world > 1:
        log_info(f"OMP_NUM_THREADS is not set; every rank uses {torch.get_num_threads()} threads")


def build_single_process(config: Config, training: bool = False, initial_weights: bool = True) -> TrainState:
    """The whole model in this process, for evaluation, export checks and tools."""
    platform = detect(config.run.device)
    init_process_group(DistributedEnv(0, 1, 0, None, 0, "alone"), platform)
    return setup_training(config, platform, 1, training, initial_weights)
