"""Seconds of the phases of a step: the moments that core's schedules and reductions report to their `timers`, two of
ours, and communication by axis, which is taken out of the phase that it happens in. On a GPU phases are timed by events
on its stream (of communication: what the stream waits for it), on a CPU by the clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_ettin.platform import Platform

# core's names -> ours; what is inside another one of them is not listed
PHASES = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "data": "data",
    "optimizer": "optimizer",
}
COMMUNICATION = "communication "


class PhaseTimers:
    """What core calls `config.timers`: `timers(name, log_level).start()` and `.stop()`."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.spans: list[tuple[str, str | None, Any, Any]] = []  # phase, the one it is inside of, begin, end
        self.open: list[tuple[str, Any]] = []

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        return Timer(self, name)

    @contextlib.contextmanager
    def communication(self, axis: str) -> Iterator[None]:
        self.start(COMMUNICATION + axis)
        try:
            yield
        finally:
            self.stop(COMMUNICATION + axis)

    def start(self, phase: str) -> None:
        self.open.append((phase, self.platform.moment()))

    def stop(self, phase: str) -> None:
        while self.open and (ended := self.open.pop()):  # one that an error left open goes with it
            if ended[0] == phase:
                inside = self.open[-1][0] if self.open else None
                self.spans.append((phase, inside, ended[1], self.platform.moment()))
                return

    def seconds(self) -> dict[str, float]:
        """Sums by phase, every phase among them; waits for the device."""
        self.platform.synchronize()
        found = dict.fromkeys(PHASES.values(), 0.0)
        for phase, inside, begin, end in self.spans:
            seconds = self.platform.seconds_between(begin, end)
            found[phase] = found.get(phase, 0.0) + seconds
            if inside is not None:
                found[inside] -= seconds
        return {phase: max(0.0, value) for phase, value in found.items()}


class Timer:
    """Of one phase; those of core that are none of ours are not timed."""

    def __init__(self, owner: PhaseTimers, name: str) -> None:
        self.owner, self.phase = owner, PHASES.get(name)

    def start(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.owner.start(self.phase)

    def stop(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.owner.stop(self.phase)
