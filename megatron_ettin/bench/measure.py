"""Time training steps of a run as `ettin train` does them: the same setup, loader and step, with nothing written.

Warm-up steps come first, then the steps whose seconds count. Two more steps run with timers for the phases of a step.
They do not count, because the timers take time themselves. On a CPU, which does not count its allocations, one more
step follows whose tensors are counted.

The phases are forward and backward, which core's schedules report to their `timers`, data, optimizer, and communication
by axis. Communication is subtracted from the phase in which it happens. On a GPU phases are timed by events on its
stream (for communication: how long the stream waits for it), on a CPU by the clock.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ettin.batching.batches import Batches, MicroBatch
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.model.config import DTYPES
from megatron_ettin.parallel.collectives import all_reduce_sum
from megatron_ettin.parallel.env import DistributedEnv
from megatron_ettin.parallel.groups import AXES, axes_of_groups, destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
from megatron_ettin.platform import Platform
from megatron_ettin.platform.trackers import CommVolumeTracker, PeakMemoryTracker
from megatron_ettin.train.progress import Progress, StepResult
from megatron_ettin.train.setup import TrainState, setup_training
from megatron_ettin.train.step import train_step

TIMED_STEPS = 2


def measure(
    config: Config, dataset: Any, env: DistributedEnv, platform: Platform, warm_up: int, steps: int
) -> dict[str, Any]:
    """Measure one run on all ranks and return the figures, equal on every rank.

    Args:
        config: the run.
        dataset: the run's rows.
        env: this process among the ranks.
        platform: this rank's device.
        warm_up: steps that are not counted.
        steps: steps after them, which are counted.

    Raises:
        UserError: the run is not valid.
        torch.OutOfMemoryError: the device's memory does not suffice.
    """
    train_state = None
    platform.reset_peak_memory()
    try:
        init_process_group(env, platform)
        train_state = setup_training(config, platform, env.world)
        return measure_steps(train_state, dataset, warm_up, warm_up + steps)
    except BaseException as error:
        # the frames of the traceback keep the groups alive, in which the other ranks wait
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if train_state is not None:
            train_state.close()
        train_state = None
        destroy_model_parallel()
        destroy_process_group()


def measure_steps(train_state: TrainState, dataset: Any, warm_up: int, timed_from: int) -> dict[str, Any]:
    """Measure a run that is set up and return the figures, equal on every rank (collective).

    Steps [warm_up, timed_from) are timed; the phases are those of the steps after them.
    """
    platform, config = train_state.platform, train_state.config
    batches = Batches.of(config, dataset, train_state.layout, platform.device)
    end = timed_from + TIMED_STEPS + (0 if platform.is_gpu else 1)
    with batches.prefetched(0, end):
        results = []
        # no comprehension: its closure would keep the train state of a step that fails
        for step in range(timed_from):
            results.append(step_once(train_state, batches, step))
        phases, sent = time_phases(train_state, batches, timed_from)
        if platform.is_gpu:
            tensor_bytes = platform.peak_memory_bytes()
        else:
            with PeakMemoryTracker() as live:
                step_once(train_state, batches, end - 1)
            tensor_bytes = live.peak_bytes
    return summarize(train_state, results[warm_up:], phases, sent, tensor_bytes)


def step_once(train_state: TrainState, batches: Batches, step: int) -> StepResult:
    """Run step `step`, counted from 0, as `ettin train` does, with its anomaly detector."""
    train_state.progress = Progress(step)
    return train_step(train_state, batches, train_state.config.optim.lr, train_state.detector)


def time_phases(train_state: TrainState, batches: Batches, first: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time the phases of a step on this rank.

    Returns:
        (seconds of each phase, with the rest of a step as `other`; bytes that the rank passes to each axis's groups)
    """
    timers, volumes = PhaseTimers(train_state.platform), CommVolumeTracker(axes_of_groups())
    settings = train_state.model_chunks[0].config
    optimizer: Any = train_state.optimizer
    prepare, update = optimizer.prepare, optimizer.update
    source: Any = batches
    made = source.step
    source.step = lambda step: timed_batches(made(step), timers)
    settings.timers, settings.barrier_with_L1_time = timers, False
    optimizer.prepare, optimizer.update = timers.span("optimizer")(prepare), timers.span("optimizer")(update)
    try:
        seconds = 0.0
        for step in range(first, first + TIMED_STEPS):
            with volumes.track(lambda axis: timers.span(COMMUNICATION + axis)):
                seconds += step_once(train_state, batches, step).seconds
    finally:
        del source.step
        settings.timers, optimizer.prepare, optimizer.update = None, prepare, update
    phases = {name: value / TIMED_STEPS for name, value in timers.seconds().items()}
    phases["other"] = max(0.0, seconds / TIMED_STEPS - sum(phases.values()))
    return phases, {axis: sent / TIMED_STEPS for axis, sent in volumes.by_axis().items()}


def timed_batches(batches: Iterator[MicroBatch], timers: PhaseTimers) -> Iterator[MicroBatch]:
    """Yield the micro-batches, and time the waits for them as the phase "data"."""
    while True:
        with timers.span("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def summarize(
    train_state: TrainState,
    results: list[StepResult],
    phases: dict[str, float],
    sent: dict[str, float],
    tensor_bytes: int,
) -> dict[str, Any]:
    """Combine the figures of all ranks (collective); `phases`, `sent` and `tensor_bytes` are those of this rank."""
    world, platform = train_state.layout.topology.world, train_state.platform
    speeds = [result.step_tokens / result.seconds for result in results]
    rates = [result.flops / result.seconds / world for result in results]
    dtype = DTYPES[PRECISIONS[train_state.config.precision.name].compute]
    peak, source = platform.peak_flops, f"data sheet of {platform.name}, dense bf16"
    if peak is None:
        peak, source = platform.measured_peak_flops(dtype), f"largest matrix product measured here, {dtype}"
    axes = sorted(set(AXES) | {"all"})
    # the same names in the same order on every rank
    parts = {**{COMMUNICATION + axis: 0.0 for axis in axes}, **phases}
    names = sorted(parts)
    # one slot per rank, 1 in that of this rank: the sum over ranks has every rank's value in its slot
    own = [float(rank == train_state.layout.rank) for rank in range(world)]
    memory = [one * part for part in (platform.peak_memory_bytes(), tensor_bytes) for one in own]
    bytes_ = [sent.get(axis, 0.0) for axis in axes]
    sums = all_reduce_sum([*(parts[name] for name in names), *bytes_, *memory], platform.device)
    moved, of_ranks = sums[len(names) :][: len(axes)], sums[len(names) + len(axes) :]
    middle = statistics.median(speeds)
    return {
        "tokens_per_second": middle,
        "tokens_per_second_per_gpu": middle / world,
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "step_seconds": [result.seconds for result in results],
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
        "steps": len(results),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


# core's names of timers -> phases; timers inside these are not listed
PHASES = {"forward-compute": "forward", "backward-compute": "backward"}
COMMUNICATION = "communication "


class PhaseTimers:
    """Timers that core calls as `config.timers(name, log_level).start()` and `.stop()`."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        # (phase, enclosing phase or None, begin, end)
        self.spans: list[tuple[str, str | None, Any, Any]] = []
        self.open: list[tuple[str, Any]] = []

    def __call__(self, name: str, log_level: int = 0) -> PhaseTimer:
        """Return the timer of a phase by core's name for it."""
        return PhaseTimer(self, name)

    @contextlib.contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Time what runs inside the context, or in a function that it decorates, as a phase."""
        self.start(phase)
        try:
            yield
        finally:
            self.stop(phase)

    def start(self, phase: str) -> None:
        """Begin a phase, perhaps inside another."""
        self.open.append((phase, self.platform.record_event()))

    def stop(self, phase: str) -> None:
        """End a phase."""
        # a phase that an error left open is dropped
        while self.open and (ended := self.open.pop()):
            if ended[0] == phase:
                inside = self.open[-1][0] if self.open else None
                self.spans.append((phase, inside, ended[1], self.platform.record_event()))
                return

    def seconds(self) -> dict[str, float]:
        """Wait for the device and return the seconds of every phase, without the phases inside it."""
        self.platform.synchronize()
        sums = dict.fromkeys((*PHASES.values(), "data", "optimizer"), 0.0)
        for phase, inside, begin, end in self.spans:
            seconds = self.platform.elapsed_seconds(begin, end)
            sums[phase] = sums.get(phase, 0.0) + seconds
            if inside is not None:
                sums[inside] -= seconds
        return {phase: max(0.0, value) for phase, value in sums.items()}


class PhaseTimer:
    """Timer of one phase; does nothing for names that PHASES lacks."""

    def __init__(self, owner: PhaseTimers, name: str) -> None:
        self.owner, self.phase = owner, PHASES.get(name)

    def start(self, barrier: bool = False) -> None:
        """Begin the phase."""
        if self.phase is not None:
            self.owner.start(self.phase)

    def stop(self, barrier: bool = False) -> None:
        """End the phase."""
        if self.phase is not None:
            self.owner.stop(self.phase)
