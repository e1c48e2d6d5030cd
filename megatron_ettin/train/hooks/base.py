"""Define the interface of hooks, which do what happens around the steps of a run, such as metrics and checkpoints.

The training loop calls `start`, `step` and `stop`; the hook that saves calls the others. Hooks run on every rank, in
order, and a hook that writes checks the rank itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ettin.batching.batches import Batches
from megatron_ettin.config.schema import Config
from megatron_ettin.faults.heartbeat import Heartbeat
from megatron_ettin.train.progress import ControlSignal, Progress, StepResult, is_done
from megatron_ettin.train.setup import TrainState


@dataclass
class Run:
    """State of a run that the hooks read, and the signal that they may send."""

    train_state: TrainState
    batches: Batches
    directory: Path
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    signal: ControlSignal = ControlSignal.NONE
    """Signal that rank 0 sends to all ranks with the next step."""
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Context managers to close when the run ends, however it ends."""

    @property
    def config(self) -> Config:
        """Configuration of the run."""
        return self.train_state.config

    @property
    def progress(self) -> Progress:
        """Progress of the run; replaced after every step."""
        return self.train_state.progress

    @property
    def is_done(self) -> bool:
        """Return whether all tokens or steps are trained."""
        return is_done(self.config.run, self.progress)

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0."""
        return self.train_state.layout.rank == 0


class Hook:
    """Base class of the hooks. Its methods do nothing; a hook overrides those that it needs."""

    def start(self, run: Run) -> None:
        """Act before the first step."""

    def step(self, run: Run, result: StepResult) -> None:
        """Act after a step."""

    def save(self, run: Run, path: Path) -> None:
        """Act after a checkpoint was published: on rank 0, and on other ranks only if they waited for the save."""

    def stop(self, run: Run) -> None:
        """Act after the last step. Hooks are stopped in reverse order."""

    def save_blocker(self) -> str | None:
        """Return why the run must not be saved now, or None. Called on rank 0 before each save."""
        return None
