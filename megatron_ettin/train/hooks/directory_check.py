"""Whether the run's directory is still there."""

from __future__ import annotations

import time

from megatron_ettin.faults.skipped_steps import TrainingStopped
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.hooks.checkpointing import GONE
from megatron_ettin.train.step import StepInfo

CHECK_SECONDS = 5.0
RECORD = "config.yaml"  # written before the first step, and never removed by a run


class DirectoryCheck(Hook):
    """End a run whose directory was removed: its record is gone, and what it would save would be a run without one.

    Rank 0 looks; the sums of the next step tell the others. It comes after the checkpoints and overrules their
    requests.
    """

    def start(self, run: Run) -> None:
        self.looked = time.monotonic()
        self.is_gone = False

    def step(self, run: Run, info: StepInfo) -> None:
        if info.asked == GONE:
            raise self._stopped(run)
        if not run.is_chief:
            return
        if time.monotonic() - self.looked >= CHECK_SECONDS:
            self._look(run)
        if self.is_gone:
            run.request = GONE

    def stop(self, run: Run) -> None:
        if run.is_chief:
            self._look(run)
        if run.machine.layout.from_chief(self.is_gone):
            raise self._stopped(run)

    def _look(self, run: Run) -> None:
        self.looked = time.monotonic()
        try:
            (run.directory / RECORD).stat()
        except FileNotFoundError:
            self.is_gone = True
        except OSError:
            # the file system does not answer, which says nothing of the directory
            return

    def _stopped(self, run: Run) -> TrainingStopped:
        return TrainingStopped(
            f"{run.directory}: removed while the run trained ({RECORD} is gone); the run ends after step"
            f" {run.progress.step} and saves nothing more"
        )
