"""Where a rank is in its step, and how long it takes until the first sum over all ranks: from there on the ranks wait
for the slowest of them, and their seconds say nothing any more of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from megatron_ettin.faults.hang_report import COMPUTE, DATA, FIGURES, LATE_UPDATE, REDUCE, UPDATE
from megatron_ettin.parallel.failure_report import Heartbeat
from megatron_ettin.platform import Platform

Item = TypeVar("Item")


class StepTimer:
    """Told by `train_step`, read by the watchdog (through the heartbeat) and by the stragglers' hook."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.heartbeat = Heartbeat()
        self.seconds = 0.0  # of the last step, until its first sum; on a GPU of the device's time
        self._began: Any = None
        self._arrived: Any = None

    def begin(self) -> None:
        self._began, self._arrived = self.platform.record_event(), None

    def reading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The micro-batches, with what waits for data told apart from what computes."""
        items = iter(batches)
        while True:
            self.heartbeat.set_phase(DATA)
            try:
                item = next(items)
            except StopIteration:
                return
            self.heartbeat.set_phase(COMPUTE)
            yield item

    def arrive(self) -> None:
        """At the first sum over all ranks."""
        self.heartbeat.set_phase(REDUCE)
        self._arrived = self.platform.record_event()

    def update(self) -> None:
        self.heartbeat.set_phase(UPDATE)

    def last_sum(self) -> None:
        self.heartbeat.set_phase(FIGURES)

    def late_update(self) -> None:
        """Of a step whose figures were judged before."""
        self.heartbeat.set_phase(LATE_UPDATE)

    def end(self) -> None:
        """The step is done, and on a GPU the device with it."""
        if self._arrived is not None:
            self.seconds = self.platform.elapsed_seconds(self._began, self._arrived)
