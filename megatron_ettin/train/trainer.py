"""Train a run for `ettin train`: set it up, load its newest checkpoint, and step until the phase's tokens are done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.tables import OBJECTIVES
from megatron_ettin.config.values import validation_sets
from megatron_ettin.data.local_copy import open_local_copy
from megatron_ettin.evaluate.evaluation import build_eval_dataset
from megatron_ettin.faults.consistency import WeightHashCheck, check_ranks_consistent
from megatron_ettin.faults.heartbeat import Heartbeat, RankInfo
from megatron_ettin.faults.skipped_steps import BadNumbersError, TrainingStoppedError, handle_anomaly, way_back
from megatron_ettin.faults.stragglers import Stragglers
from megatron_ettin.faults.watchdog import Watchdog, collective_seconds
from megatron_ettin.optim.schedule import lr_fraction
from megatron_ettin.parallel.env import read_distributed_env
from megatron_ettin.parallel.failure_report import end_now, exit_with_parent, report_folder
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import (
    destroy_process_group,
    init_process_group,
    release_store,
)
from megatron_ettin.platform import detect
from megatron_ettin.runs import launches
from megatron_ettin.train import resume
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.hooks.checkpointing import Checkpoints, DirectoryCheck
from megatron_ettin.train.hooks.console import Console
from megatron_ettin.train.hooks.metrics import Evaluation, Metrics
from megatron_ettin.train.hooks.profiling import GarbageCollection, Profiling
from megatron_ettin.train.job import TrainJob
from megatron_ettin.train.progress import ControlSignal
from megatron_ettin.train.run_log import complete_line, ending_lines, log_start
from megatron_ettin.train.setup import setup_training
from megatron_ettin.train.step import train_step
from megatron_ettin.train.stop_signal import StopSignal

RENDEZVOUS_SECONDS = 600.0
# by how much the times may differ that hosts take to copy the data
COPY_SECONDS = 7_200.0


class Trainer:
    """Trains one run after another as this process's rank."""

    def __init__(self, jobs: Sequence[TrainJob], is_sweep: bool = False) -> None:
        """Read this process's rank, choose its device, and receive stop signals from now on. Raises UserError.

        Args:
            jobs: The phases of a chain or the members of a sweep that are left to train, in order, at least one.
            is_sweep: Whether the next run begins even if one ended with TrainingStoppedError.
        """
        self.jobs, self.is_sweep, first = jobs, is_sweep, jobs[0].config
        self.env = read_distributed_env()
        self.is_main_process = self.env.rank == 0
        if self.env.source != "alone":
            exit_with_parent()
        self.platform = detect(first.runtime.device, self.env.local_rank)
        if first.runtime.deterministic:
            self.platform.make_deterministic()
        self.stop = StopSignal(first.resilience.save_on_signal, logs_end=self.env.local_rank == 0)
        folder = report_folder() if self.is_main_process else None
        self.heartbeat = Heartbeat(folder, first.resilience.hang_seconds)

    def run(self) -> bool:
        """Train the runs, each from its lock to its last save (collective).

        Returns:
            True if a stop was requested before the end of the last run, so that the job is to be requeued.
        """
        with contextlib.ExitStack() as process:
            process.callback(release_store)
            process.callback(self.stop.close)
            for job in self.jobs:
                # a request to stop holds for all runs that are left
                stopped = self.stop.received
                try:
                    if not stopped:
                        # no variable of this function holds the results of `start`, so that their memory is free
                        # when the next run begins
                        with contextlib.ExitStack() as stack:
                            stopped = self.train(*self.start(job, stack))
                except TrainingStoppedError as error:
                    if not self.is_sweep:
                        raise
                    if self.is_main_process:
                        log_warning(f"{job.args.run_dir}: {error}")
                if stopped:
                    self.heartbeat.enter("stopped")
                    return True
            self.heartbeat.enter("done")
        return False

    def start(self, job: TrainJob, stack: contextlib.ExitStack) -> tuple[Run, list[Hook]]:
        """Set up a run, load the checkpoint or weights that it continues from, and log its start (collective).

        Args:
            job: The run.
            stack: Stack on which this method puts the cleanup of the run.

        Returns:
            The run and its hooks.
        """
        config, args, heartbeat = job.config, job.args, self.heartbeat
        self.stop.begun = False
        if self.is_main_process:
            stack.enter_context(launches.locked(args.run_dir))
            if line := complete_line(config.run, args.run_dir):
                log_info(line)
        heartbeat.hang_seconds = config.resilience.hang_seconds
        copy_folder, corpus, patience = config.data.local_copy, job.corpus, RENDEZVOUS_SECONDS
        heartbeat.enter("starting", COPY_SECONDS if copy_folder is not None else None)
        if copy_folder is not None:
            corpus, patience = open_local_copy(corpus, copy_folder), COPY_SECONDS
        init_process_group(self.env, self.platform, collective_seconds(heartbeat.hang_seconds), patience)
        heartbeat.enter("starting")
        stack.callback(destroy_process_group)
        watchdog = stack.enter_context(Watchdog(args.run_dir, heartbeat, self.env.rank))
        # done before the watchdog ends, because other ranks may keep this one waiting
        stack.callback(destroy_process_group)
        stack.callback(destroy_model_parallel)
        # closed after `explaining_failures` has seen an error, because that may end the process
        closing = stack.enter_context(contextlib.ExitStack())
        stack.enter_context(self.explaining_failures(watchdog))
        check_ranks_consistent(config, job.corpus)
        train_state = setup_training(config, self.platform, self.env.world)
        closing.callback(train_state.close)
        train_state.clock.heartbeat = heartbeat
        train_state.progress, origin = resume.begin(train_state, args, job.corpus)
        progress = train_state.progress
        batches = Batches.of(config, corpus, train_state.layout, self.platform.device)
        launches.check_reader(config, job.corpus, corpus)
        launches.check_skips(args.run_dir, job.corpus, batches.sizes.rows_before(progress.step))
        run = Run(train_state, batches, args.run_dir, heartbeat, closing=stack)
        stack.enter_context(self.naming_way_back(run))
        heartbeat.enter("first step", step=progress.step, saved_step=progress.step)
        if self.is_main_process:
            log_start(run, job, self.env, origin)
        return run, build_hooks(run, watchdog.peers, job)

    @contextlib.contextmanager
    def explaining_failures(self, watchdog: Watchdog) -> Iterator[None]:
        """End the process with status 75 if a stall caused an error in the block.

        With several ranks on GPUs, any other error but UserError and TrainingStoppedError ends it with status 1,
        without cleanup.
        """
        try:
            yield
        except Exception as error:
            watchdog.explain()
            if self.platform.is_gpu and self.env.world > 1 and not isinstance(error, (UserError, TrainingStoppedError)):
                # the others wait for this rank in a kernel, and to destroy the groups it would wait for them
                end_now(error)
            raise

    @contextlib.contextmanager
    def naming_way_back(self, run: Run) -> Iterator[None]:
        """Add the last good checkpoint to the message of a BadNumbersError that is raised in the block."""
        try:
            yield
        except BadNumbersError as bad:
            if not self.is_main_process:
                raise
            raise BadNumbersError(f"{bad}; {way_back(run.directory, run.progress)}") from None

    def train(self, run: Run, hooks: Sequence[Hook]) -> bool:
        """Train until the run is done or a stop is requested. Return whether steps are left, alike on every rank."""
        self.stop.begun = True
        train_state, settings, loss = run.train_state, run.config.run, None
        for hook in hooks:
            hook.start(run)
        stopped = run.is_done
        with run.batches.prefetched(run.progress.step, settings.steps):
            while not stopped:
                detector = train_state.detector
                lr = run.config.optim.lr * lr_fraction(run.progress.tokens, run.config.schedule, settings.tokens)
                signal = max(run.signal, ControlSignal.STOP if self.stop.received else ControlSignal.NONE)
                result = train_step(train_state, run.batches, lr, detector, signal)
                progress = run.progress.after(result, detector)
                if result.anomaly is not None:
                    handle_anomaly(run, result, result.anomaly, progress)
                train_state.progress, loss = progress, result.loss
                run.heartbeat.step(step=result.step, tokens=result.tokens)
                for hook in hooks:
                    hook.step(run, result)
                stopped = result.stop_requested or run.is_done
        # in reverse, so that the hooks for metrics are still open for the last checkpoint
        for hook in reversed(hooks):
            hook.stop(run)
        left_out = run.progress.skipped_in_row
        if run.is_done and left_out:
            last = "step" if left_out == 1 else f"{left_out} steps"
            raise BadNumbersError(
                f"the run ends with the updates of its last {last} left out; nothing of them was saved"
            )
        if self.is_main_process:
            log_info(*ending_lines(settings, run.directory, run.progress, loss))
        return not run.is_done


def build_hooks(run: Run, peers: Sequence[RankInfo], job: TrainJob) -> list[Hook]:
    """Return the hooks in the order in which they run.

    Evaluation adds figures that the metrics then write, and checkpoints come after both. Raises UserError if the
    validation data have another tokenizer than the training data.
    """
    hooks: list[Hook] = [GarbageCollection(), Stragglers(peers), Metrics(), Console(job.args.json_stream)]
    if run.config.data.validation is not None:
        sets = validation_sets(run.config.data.validation)
        objectives = OBJECTIVES[run.config.run.objective].row_objectives
        held_out = [build_eval_dataset(run.train_state, sets, one) for one in reversed(objectives)]
        for batches in held_out[0].sources.values():
            if batches.corpus.tokenizer_fingerprint != run.batches.corpus.tokenizer_fingerprint:
                path = batches.corpus.datasets[0].path
                raise UserError(f"data.validation: {path} was made with another tokenizer than the data")
        hooks.insert(0, Evaluation(held_out))
    return [*hooks, WeightHashCheck(), Checkpoints(hooks), DirectoryCheck(), Profiling()]
