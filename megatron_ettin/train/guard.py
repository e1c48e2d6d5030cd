"""Whether a step's loss and gradient norm are numbers to train on.

A figure is bad that is not finite, or a spike: more than `resilience.spike_sigmas` standard deviations above the mean
of the latest `spike_window` steps (the rule and its defaults are those of OLMo-core's SkipStepOptimizer). All ranks
judge the same global figures, so all come to the same; what is remembered is part of the run's progress, so a resumed
run judges as one that never stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ettin.config.schema import Config, ResilienceConfig


@dataclass(frozen=True)
class Bad:
    """`action`: "skip" (the update is left out), "stop" (the run), "ignore" (told of)."""

    why: str
    action: str


@dataclass(frozen=True)
class Guard:
    """What one step is judged by. `recent`: (loss, gradient norm) of steps before it, the latest last."""

    settings: ResilienceConfig
    recent: tuple[tuple[float, float], ...] = ()
    can_skip: bool = True  # an engine that updates before its figures are known cannot

    @property
    def skips(self) -> bool:
        """Whether the update has to wait for the verdict."""
        wanted = (self.settings.on_nonfinite, self.settings.on_spike)
        return self.can_skip and any(action != "ignore" for action in wanted)

    def judge(self, loss: float, grad_norm: float) -> Bad | None:
        """What is wrong with the figures of the step at hand, None where nothing is."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                # with the weights already updated, what may not be kept ends the run
                action = self.settings.on_nonfinite
                return Bad(f"{name} is {value}", "stop" if action == "skip" and not self.can_skip else action)
        for number, (name, value) in enumerate((("loss", loss), ("gradient norm", grad_norm))):
            limit = self.limit([pair[number] for pair in self.recent])
            if limit is not None and value > limit:
                action = self.settings.on_spike
                why = f"{name} {value:.4g} is above {limit:.4g} ({self.settings.spike_sigmas:g} sigmas)"
                return Bad(why, "ignore" if action == "skip" and not self.can_skip else action)
        return None

    def limit(self, values: list[float]) -> float | None:
        """The largest value that is no spike; None while there are too few to say."""
        if len(values) < max(2, self.settings.spike_window // 2):
            return None
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return mean + self.settings.spike_sigmas * math.sqrt(variance)

    def after(self, loss: float, grad_norm: float) -> tuple[tuple[float, float], ...]:
        """`recent` for the next step. A spike is remembered (of a new level, the later steps are none), what is no
        number is not."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self.recent
        return (*self.recent, (loss, grad_norm))[-self.settings.spike_window :]


def told_at_start(config: Config, can_skip: bool) -> str | None:
    """A line where the settings ask for what the engine cannot do."""
    if can_skip or "skip" not in (config.resilience.on_nonfinite, config.resilience.on_spike):
        return None
    return (
        f"parallel.engine={config.parallel.engine} updates before figures are known: what is not finite stops the run,"
        " spikes are told of (resilience.on_nonfinite, on_spike)"
    )
