"""Sum the totals of a step over its micro-batches and ranks, and record a step's result and a run's progress.

Each total has a slot in one fp64 tensor, and one all-reduce sums them over the ranks. To add a metric, call `add` where
its value is known. Every rank must call it, with `None` if it has no value. A total whose name `train_step` does not
use becomes a key of metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron_ettin.config.schema import RunSettings
from megatron_ettin.faults.anomalies import Anomaly, AnomalyDetector
from megatron_ettin.parallel.collectives import all_reduce_sum

Reduction = Literal["sum", "mean", "rank_zero"]
# totals that `train_step` uses. New ones follow them, because the order decides how an all-reduce rounds the sums
STEP_SLOTS = (
    *("loss", "labels", "tokens", "global_pairs", "local_pairs", "causal_loss", "causal_labels"),
    *("stop", "signal", "grad_norm"),
)


class StepTotals:
    """Named totals of one step on this rank. The device may still be computing values that are tensors."""

    def __init__(self) -> None:
        self._reductions: dict[str, Reduction] = {}
        self._slots: dict[str, None] = dict.fromkeys(STEP_SLOTS)
        self._numbers: dict[str, float] = {}
        self._tensors: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, value: torch.Tensor | float | None, reduce: Reduction = "sum") -> None:
        """Add a value to the total `name`.

        Args:
            name: name of the total.
            value: a number or a scalar tensor; None only creates the slot, on a rank that has no value.
            reduce: "sum" or "mean" of all values of all ranks, or "rank_zero" for the value of rank 0. The latter
                becomes NaN or infinite if it is so on any rank, so that all ranks decide alike.
        """
        if self._reductions.setdefault(name, reduce) != reduce:
            raise ValueError(f"{name}: was added with reduce={self._reductions[name]!r}, now with {reduce!r}")
        self._slots.setdefault(name)
        if reduce == "mean":
            self.add(count_of(name), None if value is None else 1.0)
        if isinstance(value, torch.Tensor):
            self._tensors.setdefault(name, []).append(value.detach())
        elif value is not None:
            self._numbers[name] = self._numbers.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        """Wait for the device once, and return this rank's sums by name."""
        sums = dict.fromkeys(self._slots, 0.0) | self._numbers
        if self._tensors:
            on_device = torch.stack([torch.stack(values).sum().double() for values in self._tensors.values()])
            for name, value in zip(self._tensors, on_device.tolist(), strict=True):
                sums[name] += value
        return sums

    def all_reduce(self, rank: int, device: torch.device) -> dict[str, float]:
        """Return each total over all ranks, equal on every rank. Collective: one all-reduce.

        Args:
            rank: this process's global rank.
            device: device on which the process group's backend reduces tensors.
        """
        own = self.read()
        for name, reduce in self._reductions.items():
            if reduce == "rank_zero" and rank > 0 and math.isfinite(own[name]):
                own[name] = 0.0
        sums = dict(zip(own, all_reduce_sum(list(own.values()), device), strict=True))
        for name, reduce in self._reductions.items():
            if reduce == "mean":
                count = sums.pop(count_of(name))
                sums[name] = sums[name] / count if count else math.nan
        return sums


def count_of(name: str) -> str:
    """Return the name of the slot that counts the values of a total that is a mean."""
    return f"count of {name}"


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
    """Result of a step, equal on every rank except for `seconds`."""

    step: int
    """Number of the step, from 1."""
    tokens: int
    """Tokens of the run so far, padding not counted."""
    loss: float
    """Mean loss over the step's predicted tokens, in nats."""
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
    """Duration of the step on this rank."""
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
    """Updates left out in total."""

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
        """Return the progress in a progress.json. Fields that an older version did not write get their defaults."""
        counts = {f.name: int(saved.get(f.name, 0)) for f in dataclasses.fields(cls) if f.name != "recent"}
        # an older version wrote pairs of loss and gradient norm
        norms = (one[1] if isinstance(one, list | tuple) else one for one in saved.get("recent", ()))
        return cls(recent=tuple(float(norm) for norm in norms), **counts)


def is_done(settings: RunSettings, progress: Progress) -> bool:
    """Return whether a run has trained all its tokens or steps."""
    return progress.tokens >= settings.tokens or (settings.steps is not None and progress.step >= settings.steps)
