"""Record how far a run is: what a checkpoint stores besides weights and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ettin.config.schema import RunSettings
from megatron_ettin.faults.anomalies import AnomalyDetector
from megatron_ettin.train.totals import StepResult


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
