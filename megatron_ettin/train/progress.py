"""Where a run stands: what a checkpoint says besides weights and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ettin.config.schema import Config
from megatron_ettin.faults.anomalies import AnomalyDetector
from megatron_ettin.train.step import StepInfo


@dataclass(frozen=True)
class Progress:
    """`updates` counts optimizer steps, over phases that kept the optimizer. The rest is the guard's: `recent` as in
    `Guard`, updates left out since the last that was not, and in all."""

    step: int = 0
    tokens: int = 0
    updates: int = 0
    recent: tuple[float, ...] = ()
    skipped_in_row: int = 0
    skipped: int = 0

    def after(self, info: StepInfo, guard: AnomalyDetector) -> Progress:
        """The same with one step more."""
        left_out = int(not info.updated)
        return Progress(
            step=info.step,
            tokens=info.tokens,
            updates=self.updates + int(info.updated),
            recent=guard.after(info.loss, info.grad_norm),
            skipped_in_row=self.skipped_in_row + 1 if left_out else 0,
            skipped=self.skipped + left_out,
        )

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Progress:
        """From what a checkpoint says; older ones say less."""
        counts = {f.name: int(saved.get(f.name, 0)) for f in dataclasses.fields(cls) if f.name != "recent"}
        # once pairs of loss and gradient norm
        norms = (one[1] if isinstance(one, list | tuple) else one for one in saved.get("recent", ()))
        return cls(recent=tuple(float(norm) for norm in norms), **counts)


def is_done(config: Config, progress: Progress) -> bool:
    """Whether a run has trained all its tokens or steps."""
    steps = config.run.steps
    return progress.tokens >= config.run.tokens or (steps is not None and progress.step >= steps)
