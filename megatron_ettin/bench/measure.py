"""Timing training steps of a run as `ettin train` does them: the same assembly, loader and step, nothing written.

Warm-up steps first, then steps whose seconds count, then two with timers in them for the phases of a step, which are
not counted: timers cost a little themselves; where no device counts its allocations one more, whose tensors are.

Seconds of the phases of a step: the moments that core's schedules and reductions report to their `timers`, two of
ours, and communication by axis, which is taken out of the phase that it happens in. On a GPU phases are timed by events
on its stream (of communication: what the stream waits for it), on a CPU by the clock."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ettin.batching.batches import Batches
from megatron_ettin.batching.loader import LoadedBatch, Loader, worker_count
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.faults.anomalies import AnomalyDetector
from megatron_ettin.model.config import DTYPES
from megatron_ettin.parallel.collectives import all_reduce_sum
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.parallel.groups import AXES, axes_of_groups, destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
from megatron_ettin.platform import Platform
from megatron_ettin.platform.comm_volume import CommVolumeTracker
from megatron_ettin.platform.memory import PeakMemoryTracker
from megatron_ettin.train.setup import TrainState, setup_training
from megatron_ettin.train.step import StepInfo, train_step

TIMED_STEPS = 2


@dataclass(frozen=True)
class Lengths:
    """Steps of a measurement."""

    warm_up: int
    counted: int


def measure(config: Config, corpus: Any, place: DistributedEnv, platform: Platform, lengths: Lengths) -> dict[str, Any]:
    """Figures of one run on all ranks, equal on every rank. Raises UserError, or torch's error of a full device."""
    train_state = None
    platform.reset_peak_memory()
    try:
        init_process_group(place, platform)
        train_state = setup_training(config, platform, place.world)
        return measured(train_state, corpus, lengths)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # its frames hold the groups, and the other ranks wait in them
        raise
    finally:
        if train_state is not None:
            train_state.close()
        train_state = None
        destroy_model_parallel()
        destroy_process_group()


def measured(train_state: TrainState, corpus: Any, lengths: Lengths) -> dict[str, Any]:
    """Figures of a machine's steps."""
    platform, config = train_state.platform, train_state.config
    batches = Batches.of(config, corpus, train_state.layout, platform.device)
    workers = worker_count(config.data.workers, platform.is_gpu)
    timed_from = lengths.warm_up + lengths.counted
    end = timed_from + TIMED_STEPS + (0 if platform.is_gpu else 1)
    loader = Loader(batches.host, 0, end, workers, config.data.prefetch, pinned=platform.is_gpu)
    try:
        infos, guard = [], guard_of(train_state)
        for step in range(timed_from):  # no comprehension: its closure would keep the machine of a step that fails
            infos.append(train_step(train_state, batches, step, 0, config.optim.lr, False, loader.step(step), guard))
        phases, sent = timed(train_state, batches, loader, timed_from)
        tensors = platform.peak_memory_bytes() if platform.is_gpu else counted(train_state, batches, loader, end - 1)
    finally:
        loader.close()
    return figures(train_state, infos[lengths.warm_up :], phases, sent, tensors)


def guard_of(train_state: TrainState) -> AnomalyDetector:
    """Return the guard that `ettin train` runs: it decides whether the update waits for the step's figures."""
    assert train_state.optimizer is not None
    return AnomalyDetector(train_state.config.resilience, (), train_state.optimizer.can_skip)


def out_of_memory() -> type[BaseException]:
    """What torch raises where a device's memory does not suffice."""
    return torch.OutOfMemoryError


def timed(
    train_state: TrainState, batches: Batches, loader: Loader, first: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds of a step's phases on this rank and what they leave over, bytes that it gives to each axis's groups)."""
    timers, traffic = PhaseTimers(train_state.platform), CommVolumeTracker(axes_of_groups())
    settings = train_state.model_chunks[0].config
    optimizer: Any = train_state.optimizer
    prepare, update = optimizer.prepare, optimizer.update

    def timed_as_update(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            timers("optimizer").start()
            try:
                function(*arguments)
            finally:
                timers("optimizer").stop()

        return call

    settings.timers, settings.barrier_with_L1_time = timers, False
    optimizer.prepare, optimizer.update = timed_as_update(prepare), timed_as_update(update)
    try:
        seconds = 0.0
        for step in range(first, first + TIMED_STEPS):
            waited = waiting(loader.step(step), timers)
            with traffic.track(timers.communication):
                info = train_step(
                    train_state, batches, step, 0, train_state.config.optim.lr, False, waited, guard_of(train_state)
                )
            seconds += info.seconds
    finally:
        settings.timers, optimizer.prepare, optimizer.update = None, prepare, update
    found = {name: value / TIMED_STEPS for name, value in timers.seconds().items()}
    found["other"] = max(0.0, seconds / TIMED_STEPS - sum(found.values()))
    return found, {axis: sent / TIMED_STEPS for axis, sent in traffic.by_axis().items()}


def counted(train_state: TrainState, batches: Batches, loader: Loader, step: int) -> int:
    """Bytes of the tensors that live at once at the fullest moment of a step on this rank."""
    with PeakMemoryTracker() as live:
        guard = guard_of(train_state)
        train_step(train_state, batches, step, 0, train_state.config.optim.lr, False, loader.step(step), guard)
    return live.peak_bytes


def waiting(loaded: Iterator[LoadedBatch], timers: PhaseTimers) -> Iterator[LoadedBatch]:
    while True:
        timers("data").start()
        try:
            batch = next(loaded)
        except StopIteration:
            return
        finally:
            timers("data").stop()
        yield batch


def figures(
    train_state: TrainState, infos: list[StepInfo], phases: dict[str, float], sent: dict[str, float], tensor_bytes: int
) -> dict[str, Any]:
    """What is kept of the steps."""
    world, platform = train_state.layout.topology.world, train_state.platform
    speeds = [info.step_tokens / info.seconds for info in infos]
    rates = [info.flops / info.seconds / world for info in infos]
    dtype = DTYPES[PRECISIONS[train_state.config.precision.name].compute]
    peak, source = platform.peak_flops, f"data sheet of {platform.name}, dense bf16"
    if peak is None:
        peak, source = platform.measured_peak_flops(dtype), f"largest matrix product measured here, {dtype}"
    axes = sorted(set(AXES) | {"all"})
    # the same names in the same order on every rank
    parts = {**{COMMUNICATION + axis: 0.0 for axis in axes}, **phases}
    names = sorted(parts)
    own = [float(rank == train_state.layout.rank) for rank in range(world)]  # every rank's place in a sum over all
    memory = [one * part for part in (platform.peak_memory_bytes(), tensor_bytes) for one in own]
    bytes_ = [sent.get(axis, 0.0) for axis in axes]
    sums = all_reduce_sum([*(parts[name] for name in names), *bytes_, *memory], platform.device)
    moved, of_ranks = sums[len(names) :][: len(axes)], sums[len(names) + len(axes) :]
    middle = statistics.median(speeds)
    return {
        "tokens_per_second": middle,
        "tokens_per_second_per_gpu": middle / world,
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "step_seconds": [info.seconds for info in infos],
        "tflops_per_second_per_gpu": statistics.median(rates) / 1e12,
        "mfu": statistics.median(rates) / peak,
        "peak_flops": peak,
        "peak_source": source,
        "peak_memory_bytes": int(max(of_ranks[:world])),
        "peak_tensor_bytes": int(max(of_ranks[world:])),
        "phase_seconds": {name: value / world for name, value in zip(names, sums, strict=False) if value},
        "communication_bytes": {axis: value / world for axis, value in zip(axes, moved, strict=True) if value},
        "layout": str(train_state.layout.topology),
        "attention": train_state.model_chunks[0].config.backend.attention.name,
        "steps": len(infos),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


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
        self.open.append((phase, self.platform.record_event()))

    def stop(self, phase: str) -> None:
        while self.open and (ended := self.open.pop()):  # one that an error left open goes with it
            if ended[0] == phase:
                inside = self.open[-1][0] if self.open else None
                self.spans.append((phase, inside, ended[1], self.platform.record_event()))
                return

    def seconds(self) -> dict[str, float]:
        """Sums by phase, every phase among them; waits for the device."""
        self.platform.synchronize()
        found = dict.fromkeys(PHASES.values(), 0.0)
        for phase, inside, begin, end in self.spans:
            seconds = self.platform.elapsed_seconds(begin, end)
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
