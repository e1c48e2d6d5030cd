"""Where a rank is in its step, and how long it takes until the first sum over all ranks: from there on the ranks wait
for the slowest of them, and their seconds say nothing any more of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from megatron_ettin.faults.hang_report import COMPUTE, DATA, FIGURES, LATE_UPDATE, REDUCE, UPDATE
from megatron_ettin.parallel.failure_report import Heart
from megatron_ettin.platform import Platform

Item = TypeVar("Item")


class StepClock:
    """Told by `train_step`, read by the watchdog (through the heart) and by the stragglers' hook."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.heart = Heart()
        self.seconds = 0.0  # of the last step, until its first sum; on a GPU of the device's time
        self._began: Any = None
        self._arrived: Any = None

    def begin(self) -> None:
        self._began, self._arrived = self.platform.moment(), None

    def reading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The micro-batches, with what waits for data told apart from what computes."""
        items = iter(batches)
        while True:
            self.heart.at(DATA)
            try:
                item = next(items)
            except StopIteration:
                return
            self.heart.at(COMPUTE)
            yield item

    def arrive(self) -> None:
        """At the first sum over all ranks."""
        self.heart.at(REDUCE)
        self._arrived = self.platform.moment()

    def update(self) -> None:
        self.heart.at(UPDATE)

    def last_sum(self) -> None:
        self.heart.at(FIGURES)

    def late_update(self) -> None:
        """Of a step whose figures were judged before."""
        self.heart.at(LATE_UPDATE)

    def end(self) -> None:
        """The step is done, and on a GPU the device with it."""
        if self._arrived is not None:
            self.seconds = self.platform.seconds_between(self._began, self._arrived)
