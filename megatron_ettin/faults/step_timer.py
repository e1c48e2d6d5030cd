"""Measure a rank's step until its first sum over all ranks, and report which part of the step it is in.

From that sum on the ranks wait for the slowest of them, and their seconds say nothing of a single one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from megatron_ettin.faults.hang_report import COMPUTE, DATA, FIGURES, LATE_UPDATE, REDUCE, UPDATE
from megatron_ettin.parallel.failure_report import Heartbeat
from megatron_ettin.platform import Platform

Item = TypeVar("Item")


class StepTimer:
    """Timer that `train_step` calls; the watchdog (through the heartbeat) and the stragglers' hook read it."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.heartbeat = Heartbeat()
        self.seconds = 0.0
        """Seconds of the last step until its first sum; on a GPU of the device's time."""
        self._began: Any = None
        self._arrived: Any = None

    def begin(self) -> None:
        """Start the step."""
        self._began, self._arrived = self.platform.record_event(), None

    def reading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the micro-batches, and report whether the rank waits for data or computes."""
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
        """Mark the first sum over all ranks."""
        self.heartbeat.set_phase(REDUCE)
        self._arrived = self.platform.record_event()

    def update(self) -> None:
        """Enter the update."""
        self.heartbeat.set_phase(UPDATE)

    def last_sum(self) -> None:
        """Enter the sum of the step's figures."""
        self.heartbeat.set_phase(FIGURES)

    def late_update(self) -> None:
        """Enter the update of a step whose figures were judged before."""
        self.heartbeat.set_phase(LATE_UPDATE)

    def end(self) -> None:
        """End the step, once the device has finished it."""
        if self._arrived is not None:
            self.seconds = self.platform.elapsed_seconds(self._began, self._arrived)
