"""Whether a step's loss and gradient norm are numbers to train on.

A figure that is not finite is bad, and so is a spike: a gradient norm whose logarithm lies more than
`resilience.spike_sigmas` robust standard deviations above the median of the latest `spike_window` steps, and that is at
least `spike_ratio` times that median. Median and spread (the median absolute deviation) do not move with the spikes
themselves; the logarithm makes a norm that is often twice its usual value an ordinary one. `tools/spike_rate.py`
measures how often a healthy run is called a spike. All ranks judge the same global figures, so all come to the same;
what is remembered is part of the run's progress, so a resumed run judges as one that never stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ettin.config.operations import ResilienceConfig
from megatron_ettin.config.schema import Config

NORMAL_MAD = 0.674489750196  # median absolute deviation of a normal distribution of standard deviation 1
SMALLEST_NORM = 1e-300  # that has a logarithm
LARGEST_EXPONENT = 700.0  # of a float


@dataclass(frozen=True)
class Anomaly:
    """`action`: "skip" (the update is left out), "stop" (the run), "warn" and "ignore" (trained on, told of)."""

    why: str
    action: str

    @property
    def leaves_out(self) -> bool:
        """Whether the update is not to be made."""
        return self.action in ("skip", "stop")


@dataclass(frozen=True)
class AnomalyDetector:
    """What one step is judged by. `recent`: gradient norms of steps before it, the latest last."""

    settings: ResilienceConfig
    recent: tuple[float, ...] = ()
    can_skip: bool = True  # an engine that updates before its figures are known cannot

    @property
    def skips(self) -> bool:
        """Whether the update has to wait for the verdict."""
        wanted = (self.settings.on_nonfinite, self.settings.on_spike)
        return self.can_skip and any(action in ("skip", "stop") for action in wanted)

    def judge(self, loss: float, grad_norm: float) -> Anomaly | None:
        """What is wrong with the figures of the step at hand, None where nothing is."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                # with the weights already updated, what may not be kept ends the run
                action = self.settings.on_nonfinite
                return Anomaly(f"{name} is {value}", "stop" if action == "skip" and not self.can_skip else action)
        limit, action = self.limit(), self.settings.on_spike
        if limit is None or grad_norm <= limit:
            return None
        why = f"gradient norm {grad_norm:.4g} is above {limit:.4g} ({self.settings.spike_sigmas:g} sigmas)"
        return Anomaly(why, "warn" if action == "skip" and not self.can_skip else action)

    def limit(self) -> float | None:
        """The largest gradient norm that is no spike; None where none is looked for, or too few steps are known."""
        settings = self.settings
        if settings.on_spike == "ignore" or len(self.recent) < max(2, settings.spike_window // 2):
            return None
        logs = [math.log(max(norm, SMALLEST_NORM)) for norm in self.recent]
        middle = median(logs)
        sigma = median([abs(value - middle) for value in logs]) / NORMAL_MAD
        above = max(settings.spike_sigmas * sigma, math.log(settings.spike_ratio))
        return math.exp(min(middle + above, LARGEST_EXPONENT))

    def after(self, loss: float, grad_norm: float) -> tuple[float, ...]:
        """`recent` for the next step. A spike is remembered (of a new level, the later steps are none), what is no
        number is not."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self.recent
        return (*self.recent, grad_norm)[-self.settings.spike_window :]


def median(values: list[float]) -> float:
    """Of at least one value."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def start_note(config: Config, can_skip: bool) -> str | None:
    """A line where the settings ask for what the engine cannot do."""
    if can_skip or "skip" not in (config.resilience.on_nonfinite, config.resilience.on_spike):
        return None
    return (
        f"parallel.engine={config.parallel.engine} updates before figures are known: what is not finite stops the run,"
        " spikes are told of (resilience.on_nonfinite, on_spike)"
    )
