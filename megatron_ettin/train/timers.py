"""Seconds of the phases of a step: the moments that core's schedules and reductions report to their `timers`, and two
of ours. On a GPU the phases are timed by events on its stream, on a CPU by the clock."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from megatron_ettin.platform import Platform

# core's names -> ours; what is inside another one of them is not listed
PHASES = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "gradient reduction",
    "non-tensor-parallel-grads-all-reduce": "gradient reduction",
    "embedding-grads-all-reduce": "gradient reduction",
    **dict.fromkeys(("forward-recv", "forward-send", "backward-recv", "backward-send"), "pipeline transfers"),
    **dict.fromkeys(("forward-send-backward-recv", "backward-send-forward-recv"), "pipeline transfers"),
    "data": "data",
    "optimizer": "optimizer",
}


class PhaseTimers:
    """What core calls `config.timers`: `timers(name, log_level).start()` and `.stop()`."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.open: dict[str, Any] = {}

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        return Timer(self, name)

    def seconds(self) -> dict[str, float]:
        """Sums by phase, every phase among them; waits for the device. Core asks for data within its forward phase."""
        self.platform.synchronize()
        found = dict.fromkeys(PHASES.values(), 0.0)
        for name, spans in self.spans.items():
            if name in PHASES:
                found[PHASES[name]] += sum(self.platform.seconds_between(*span) for span in spans)
        found["forward"] = max(0.0, found["forward"] - found["data"])
        return found


class Timer:
    def __init__(self, owner: PhaseTimers, name: str) -> None:
        self.owner, self.name = owner, name

    def start(self, barrier: bool = False) -> None:
        self.owner.open[self.name] = self.owner.platform.moment()

    def stop(self, barrier: bool = False) -> None:
        began = self.owner.open.pop(self.name, None)
        if began is not None:
            self.owner.spans[self.name].append((began, self.owner.platform.moment()))
