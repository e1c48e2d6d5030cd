"""Record a run's progress, the result of its latest step, and the signals between its ranks."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ettin.config.schema import RunSettings
from megatron_ettin.faults.anomalies import Anomaly, AnomalyDetector


class ControlSignal(enum.IntEnum):
    """Request of a rank to all ranks, sent with the totals of a step. The highest one wins."""

    NONE = 0
    SAVE = 1
    """Save a checkpoint after the step (from rank 0)."""
    STOP = 2
    """Save and end, so that the job can be requeued (from any rank)."""
    SAVE_FAILED = 3
    """End the run: a checkpoint could not be saved (from rank 0)."""
    GONE = 4
    """End the run: its directory was removed (from rank 0)."""


@dataclass(frozen=True)
class StepResult:
    """Result of a step, equal on every rank."""

    step: int
    """Number of the step, from 1."""
    tokens: int
    """Tokens of the run so far, padding not counted."""
    loss: float
    """Mean over the step's predicted tokens."""
    lr: float
    """Learning rate of the update."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    step_tokens: int
    """Tokens of the step, padding not counted."""
    labels: int
    """Predicted tokens of the step."""
    rows: tuple[int, int]
    """First row of the step in the order of the data, and the row after its last."""
    seconds: float
    """Duration on this rank."""
    flops: float
    """Floating-point operations of the step on all ranks."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures for metrics.jsonl; hooks add theirs."""
    signal: ControlSignal = ControlSignal.NONE
    """Strongest signal that any rank sent, equal on every rank."""
    anomaly: Anomaly | None = None
    """Anomaly in the loss or the gradient norm."""
    updated: bool = True
    """Whether the weights were updated."""

    @property
    def stop_requested(self) -> bool:
        """Return whether a rank was asked to stop."""
        return self.signal is ControlSignal.STOP


@dataclass(frozen=True)
class Progress:
    """Progress of a run, which a checkpoint stores besides weights and optimizer."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    updates: int = 0
    """Optimizer updates, over phases that kept the optimizer."""
    recent: tuple[float, ...] = ()
    """Gradient norms of recent steps, as in `AnomalyDetector`."""
    skipped_in_row: int = 0
    """Updates left out since the last one that was made."""
    skipped: int = 0
    """Updates left out in all."""

    def after(self, result: StepResult, detector: AnomalyDetector) -> Progress:
        """Return the progress one step later."""
        left_out = int(not result.updated)
        return Progress(
            step=result.step,
            tokens=result.tokens,
            updates=self.updates + int(result.updated),
            recent=detector.after(result.loss, result.grad_norm),
            skipped_in_row=self.skipped_in_row + 1 if left_out else 0,
            skipped=self.skipped + left_out,
        )

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Progress:
        """Return the progress that a checkpoint's record holds; what an older version did not write has its default."""
        counts = {f.name: int(saved.get(f.name, 0)) for f in dataclasses.fields(cls) if f.name != "recent"}
        # an older version wrote pairs of loss and gradient norm
        norms = (one[1] if isinstance(one, list | tuple) else one for one in saved.get("recent", ()))
        return cls(recent=tuple(float(norm) for norm in norms), **counts)


def is_done(settings: RunSettings, progress: Progress) -> bool:
    """Return whether a run has trained all its tokens or steps."""
    return progress.tokens >= settings.tokens or (settings.steps is not None and progress.step >= settings.steps)
