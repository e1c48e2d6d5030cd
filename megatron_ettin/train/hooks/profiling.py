"""Collect Python's garbage on all ranks at the same steps, and trace the steps of `profile.steps`."""

from __future__ import annotations

import gc

from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.platform.profiler import Profiler
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import StepResult

FOLDER = "profile"


class GarbageCollection(Hook):
    """Collects Python's garbage on every rank at the same steps, the young generations only.

    Python's own collector stops each rank at a different time, and all others wait for it at the next collective.
    """

    EVERY_STEPS = 50

    def start(self, run: Run) -> None:
        """Switch Python's own collector off."""
        gc.collect()
        gc.disable()

    def step(self, run: Run, result: StepResult) -> None:
        """Collect after every `EVERY_STEPS` steps."""
        if result.step % self.EVERY_STEPS == 0:
            gc.collect(1)

    def stop(self, run: Run) -> None:
        """Switch Python's own collector on again."""
        gc.enable()


class Profiling(Hook):
    """Traces the steps of `profile.steps` on the ranks of `profile.ranks`, and summarises what took longest.

    The trace begins before the first of these steps and is written after the last, or when the run ends.
    """

    def start(self, run: Run) -> None:
        """Decide whether this rank is traced, and begin if the next step is one of the steps."""
        self.steps, ranks = run.config.profile.step_range, run.config.profile.ranks
        self.profiler: Profiler | None = None
        self.is_chosen = bool(self.steps) and (ranks is None or run.train_state.layout.rank in ranks)
        self._begin_before(run, run.progress.step + 1)

    def step(self, run: Run, result: StepResult) -> None:
        """Write the trace after the last of the steps, and begin it before the first."""
        if self.profiler is not None and result.step >= self.steps[-1]:
            self._end(run, result.step)
        self._begin_before(run, result.step + 1)

    def stop(self, run: Run) -> None:
        """Write the trace of a run that ends before the last of the steps."""
        if self.profiler is not None:
            self._end(run, run.progress.step)

    def _begin_before(self, run: Run, step: int) -> None:
        if self.is_chosen and step in self.steps and self.profiler is None:
            self.first = step
            self.profiler = Profiler(run.train_state.platform, run.config.profile.memory)
            self.profiler.start()

    def _end(self, run: Run, last: int) -> None:
        assert self.profiler is not None
        self.profiler.stop()
        name = f"steps_{self.first}-{last}_rank_{run.train_state.layout.rank:05d}"
        try:
            text = self.profiler.write(run.directory / FOLDER, name)
        # a profile that cannot be written must not end the run
        except OSError as error:
            log_warning(f"warning: profile.steps: {name} cannot be written ({error})")
        else:
            if run.is_main_process:
                log_info(f"profile of steps {self.first} to {last} in {run.directory / FOLDER}", text)
        self.profiler = None
        self.is_chosen = last < self.steps[-1]
