"""Decide from a step's loss and gradient norm whether the weights should be updated.

A figure that is not finite is an anomaly, and so is a spike: a gradient norm whose logarithm lies more than
`resilience.spike_sigmas` robust standard deviations above the median of the latest `spike_window` steps, and that is at
least `spike_ratio` times that median. The standard deviation is estimated from the median absolute deviation. Both
medians hardly change when the window contains spikes. Logarithms are compared because norms vary by factors: in a run
whose norm often doubles, twice the median is no spike. `tools/spike_rate.py` measures how often a healthy run is called
a spike. All ranks judge the same global figures, so all decide alike. The recent norms are part of the run's progress,
so a resumed run decides like one that never stopped.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from megatron_ettin.config.operations import ResilienceConfig

# median absolute deviation of a normal distribution of standard deviation 1
NORMAL_MAD = 0.674489750196
# smaller norms count as this one, because zero has no logarithm
SMALLEST_NORM = 1e-300
# bound of the exponent, so that math.exp does not overflow
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Anomaly:
    """Abnormal loss or gradient norm of a step, and what to do about it."""

    why: str
    """Figure, value and limit, for the log."""
    action: str
    """"skip" leaves the update out, "stop" also ends the run, "warn" and "ignore" make the update and report it."""

    @property
    def leaves_out(self) -> bool:
        """Return whether the update must not be made."""
        return self.action in ("skip", "stop")


@dataclass(frozen=True)
class AnomalyDetector:
    """Anomaly detector for the next step, holding the recent gradient norms."""

    settings: ResilienceConfig
    recent: tuple[float, ...] = ()
    """Gradient norms of up to `spike_window` previous steps, the latest last."""
    can_skip: bool = True
    """False if the engine updates the weights before loss and gradient norm are known."""

    @property
    def skips(self) -> bool:
        """Return whether the update must wait for `judge`, because `judge` may forbid it."""
        wanted = (self.settings.on_nonfinite, self.settings.on_spike)
        return self.can_skip and any(action in ("skip", "stop") for action in wanted)

    def judge(self, loss: float, grad_norm: float) -> Anomaly | None:
        """Return the anomaly in a step's mean loss and global gradient norm, or None."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                # if the weights are already updated, the step can no longer be skipped, so the run ends
                action = self.settings.on_nonfinite
                return Anomaly(f"{name} is {value}", "stop" if action == "skip" and not self.can_skip else action)
        limit, action = self.limit(), self.settings.on_spike
        if limit is None or grad_norm <= limit:
            return None
        why = f"gradient norm {grad_norm:.4g} is above {limit:.4g} ({self.settings.spike_sigmas:g} sigmas)"
        return Anomaly(why, "warn" if action == "skip" and not self.can_skip else action)

    def limit(self) -> float | None:
        """Return the largest gradient norm that is no spike; None if spikes are ignored or too few steps are known."""
        settings = self.settings
        if settings.on_spike == "ignore" or len(self.recent) < max(2, settings.spike_window // 2):
            return None
        logs = [math.log(max(norm, SMALLEST_NORM)) for norm in self.recent]
        middle = statistics.median(logs)
        sigma = statistics.median([abs(value - middle) for value in logs]) / NORMAL_MAD
        above = max(settings.spike_sigmas * sigma, math.log(settings.spike_ratio))
        return math.exp(min(middle + above, LARGEST_EXPONENT))

    def after(self, loss: float, grad_norm: float) -> tuple[float, ...]:
        """Return `recent` for the next step.

        A spike is added too: if the norm stays high, it is soon no spike any more. Steps with a figure that is not
        finite are not added.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self.recent
        return (*self.recent, grad_norm)[-self.settings.spike_window :]


def start_note(settings: ResilienceConfig, engine: str, can_skip: bool) -> str | None:
    """Return a log line if the settings ask for skipped updates and the engine cannot skip; otherwise None."""
    if can_skip or "skip" not in (settings.on_nonfinite, settings.on_spike):
        return None
    return (
        f"parallel.engine={engine} updates before figures are known: what is not finite stops the run,"
        " spikes are reported (resilience.on_nonfinite, on_spike)"
    )
