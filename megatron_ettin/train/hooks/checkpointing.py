"""Decide when a run is saved, and end a run whose directory was removed.

A run saves resumable checkpoints at intervals and at its end, and milestones (weights only) at intervals of tokens.
"""

from __future__ import annotations

import time

from megatron_ettin.base.log import log_warning
from megatron_ettin.faults.skipped_steps import TrainingStoppedError, way_back
from megatron_ettin.parallel.collectives import broadcast_object
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import ControlSignal, StepResult
from megatron_ettin.train.saving import Retry, SaveFailedError, Saver, SaveRequest, SaveResult, failure_line


class Checkpoints(Hook):
    """Saves at intervals of steps, tokens or minutes, on a stop signal, and at the end; retries a save that failed."""

    def __init__(self, others: list[Hook]) -> None:
        self.others = others

    def start(self, run: Run) -> None:
        """Set up the saver; it is closed when the run ends, however it ends."""
        self.begun_tokens = run.progress.tokens
        self.begun_at = time.monotonic()
        self.saved_step: int | None = run.progress.step or None
        self.is_due = self.milestone_is_due = False
        self.retry = Retry(run.config.checkpoint.retry_seconds)
        datasets = run.batches.corpus.datasets
        ends_in_sep = any(dataset.manifest.end_token != "none" for dataset in datasets)
        tokenizer = datasets[0].path / "tokenizer"
        self.saver = Saver(run.train_state, run.directory, tokenizer, ends_in_sep, self._save_blocker)
        run.closing.callback(self.saver.close)

    def step(self, run: Run, result: StepResult) -> None:
        """Begin the saves that are due. Raises SaveFailedError if one failed and `checkpoint.on_failure` is stop."""
        if run.is_main_process:
            self._handle(run, self.saver.poll())
        if result.signal is ControlSignal.SAVE_FAILED:
            raise SaveFailedError(self.failure if run.is_main_process else "a checkpoint could not be saved")
        if result.stop_requested:
            # `stop` saves
            return
        milestone = run.config.checkpoint.weights_every_tokens
        if milestone is not None and result.tokens // milestone > (result.tokens - result.step_tokens) // milestone:
            self.milestone_is_due = True
        self.is_due |= self._is_time(run, result) or result.signal is ControlSignal.SAVE
        # weights that gave bad figures are not saved: a save that is due waits until an update is made
        if not run.progress.skipped_in_row:
            self._begin_due(run)
        # the signal goes out with the next step
        if run.is_main_process:
            self._handle(run, self.saver.poll())
            if run.signal is ControlSignal.NONE and (self.retry.is_due or self._minutes_are_over(run)):
                run.signal = ControlSignal.SAVE

    def stop(self, run: Run) -> None:
        """Save the last step, unless its update was skipped or it is saved already. Raises SaveFailedError."""
        self._wait(run)
        # rank 0 reads results between steps; the other ranks do not have them yet
        self.saved_step = broadcast_object(self.saved_step)
        if run.progress.skipped_in_row:
            if run.is_main_process and not run.is_done:
                why = f"the updates of its last {run.progress.skipped_in_row} steps were left out"
                log_warning(f"step {run.progress.step}: not saved, for {why}; {way_back(run.directory, run.progress)}")
        elif run.progress.step != self.saved_step:
            self._begin(run, self._request(run))
            self._wait(run, final=True)

    def _save_blocker(self) -> str | None:
        """Return why another hook forbids to save the run now, or None."""
        return next(filter(None, (hook.save_blocker() for hook in self.others)), None)

    def _begin_due(self, run: Run) -> None:
        if self.milestone_is_due:
            self.milestone_is_due = False
            self._begin(run, SaveRequest(run.progress, milestone=True))
        if self.is_due:
            self.is_due = False
            self._begin(run, self._request(run))

    def _is_time(self, run: Run, result: StepResult) -> bool:
        settings = run.config.checkpoint
        if settings.every_steps is not None and result.step % settings.every_steps == 0:
            return True
        every = settings.every_tokens
        return every is not None and result.tokens // every > self.begun_tokens // every

    def _minutes_are_over(self, run: Run) -> bool:
        """Return whether the latest save began `checkpoint.every_minutes` ago, by this rank's clock."""
        minutes = run.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self.begun_at >= 60.0 * minutes

    def _request(self, run: Run) -> SaveRequest:
        every = run.config.checkpoint.keep_every_tokens
        keep = every is not None and run.progress.tokens // every > self.begun_tokens // every
        return SaveRequest(run.progress, keep=keep)

    def _begin(self, run: Run, request: SaveRequest) -> None:
        """Start a save (collective)."""
        self._wait(run)
        run.heartbeat.enter("saving weights" if request.milestone else "saving a checkpoint")
        if not request.milestone:
            self.begun_at = time.monotonic()
            self.begun_tokens = request.progress.tokens
            self.retry.due, run.signal = None, ControlSignal.NONE
        self.saver.begin(request)
        run.heartbeat.enter("going on from a save", run.heartbeat.hang_seconds)

    def _wait(self, run: Run, final: bool = False) -> None:
        """Wait for a save in flight (collective). Raises SaveFailedError if it is the `final` one and failed."""
        run.heartbeat.enter("waiting for a save")
        result = self.saver.wait()
        if result is not None and result.path is None and final:
            raise SaveFailedError(failure_line(result, self.saved_step, "the run ends without it"))
        self._handle(run, result)

    def _handle(self, run: Run, result: SaveResult | None) -> None:
        """Report the result of a save to the hooks and the log. Rank 0 decides whether a failure ends the run."""
        if result is None:
            return
        step, path = result.request.progress.step, result.path
        if path is not None and not result.request.milestone:
            self.saved_step = step
            # a new dict: the watchdog may be reading the old one
            run.heartbeat.figures = run.heartbeat.figures | {"saved_step": step}
            for hook in self.others:
                hook.save(run, path)
        if not result.request.milestone:
            self.retry.after(result)
        if path is None and run.is_main_process:
            stops = run.config.checkpoint.on_failure == "stop"
            if stops:
                then = "the run stops (checkpoint.on_failure)"
            elif result.request.milestone:
                then = "weights alone are not tried again"
            else:
                then = f"tried again in {self.retry.wait_seconds:g} s"
            self.failure = failure_line(result, self.saved_step, then)
            if stops:
                run.signal = ControlSignal.SAVE_FAILED
            else:
                log_warning(f"warning: {self.failure}")


CHECK_SECONDS = 5.0
# if this file is gone, the directory is: it is written before the first step, and a run never removes it
RECORD = "config.yaml"


class DirectoryCheck(Hook):
    """Ends a run whose directory was removed, because a checkpoint saved there would have no record of its run.

    Rank 0 checks, and signals to the other ranks with the totals of the next step. The hook comes after `Checkpoints`,
    so that its signal replaces theirs.
    """

    def start(self, run: Run) -> None:
        """Start the time until the first check."""
        self.looked = time.monotonic()
        self.is_gone = False

    def step(self, run: Run, result: StepResult) -> None:
        """Check every `CHECK_SECONDS`. Raises TrainingStoppedError one step after the directory was found missing."""
        if result.signal is ControlSignal.GONE:
            raise self._stopped(run)
        if not run.is_main_process:
            return
        if time.monotonic() - self.looked >= CHECK_SECONDS:
            self._look(run)
        if self.is_gone:
            run.signal = ControlSignal.GONE

    def stop(self, run: Run) -> None:
        """Check a last time (collective). Raises TrainingStoppedError if the directory is gone."""
        if run.is_main_process:
            self._look(run)
        if broadcast_object(self.is_gone):
            raise self._stopped(run)

    def _look(self, run: Run) -> None:
        self.looked = time.monotonic()
        try:
            (run.directory / RECORD).stat()
        except FileNotFoundError:
            self.is_gone = True
        except OSError:
            # the file system does not answer, which does not show that the directory is gone
            return

    def _stopped(self, run: Run) -> TrainingStoppedError:
        return TrainingStoppedError(
            f"{run.directory}: removed while the run trained ({RECORD} is gone); the run ends after step"
            f" {run.progress.step} and saves nothing more"
        )
