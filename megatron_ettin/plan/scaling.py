"""From a layout's step on few GPUs to one on thousands: what grows with their number, and what failures leave of it.

Two things grow. Collectives take a latency for each rank that they pass (step_time.py has it from the links' own), and
a step waits for the slowest of all ranks, whose expected slowness is that of the largest of n draws. A curve of
measured speeds (weak scaling) tells how much of each: the fit is a least-squares one with a prior of one percent of a
step for both at 64 GPUs, because the few points that are usually measured cannot tell them apart. Failures and
checkpoints follow Daly 2006 (Future Generation Computer Systems 22), and a simulation of weeks is held against it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

AT_GPUS = 64  # where the growth's two parts are told, relative to the smallest measured number
PRIOR, NOISE = 0.01, 0.005  # of each part at AT_GPUS; of a measured speed


@dataclass(frozen=True)
class Growth:
    """How much longer a step takes on n GPUs than on `first`. `latency` and `slowest` are shares of a step of
    `step_seconds` at AT_GPUS; None for `latency`: not measured, the links' own counts."""

    first: int
    latency: float | None = None
    slowest: float = PRIOR
    step_seconds: float | None = None

    def slowest_at(self, gpus: int) -> float:
        """By which share of its arithmetic a step waits for the slowest rank."""
        return max(0.0, float(self.slowest * _parts(np.array([gpus]), self.first)[0, 1]))

    def latency_seconds(self, ranks: int, step_seconds: float) -> float:
        """Of collectives of `ranks`, beyond those on `first`. `step_seconds`: on `first`, where the curve has none."""
        linear = float(_parts(np.array([ranks]), self.first)[0, 0])
        return max(0.0, (self.latency or 0.0) * linear) * (self.step_seconds or step_seconds)

    def factor(self, gpus: int) -> float:
        """Seconds of a step over those on `first` GPUs, with as much work for each."""
        return 1 + self.latency_seconds(gpus, 1.0) / (self.step_seconds or 1.0) + self.slowest_at(gpus)


def _parts(gpus: np.ndarray, first: int) -> np.ndarray:
    """[n, 2]: both parts at each number, 0 at `first` and 1 at AT_GPUS."""
    linear = (gpus - first) / (AT_GPUS - first)

    def largest(n: np.ndarray | float) -> np.ndarray:  # of n standard normal draws, about
        return np.sqrt(2 * np.log(np.maximum(n, 1.0)))

    return np.stack([linear, (largest(gpus) - largest(float(first))) / (largest(AT_GPUS) - largest(first))], axis=1)


def fit(speeds: Mapping[int, float], step_seconds: float | None = None) -> Growth:
    """From tokens a second of each GPU by their number: at least two numbers, the smallest below AT_GPUS; with it the
    seconds of a step on the smallest. Raises ValueError."""
    first = min(speeds, default=AT_GPUS)
    if step_seconds is not None and not 0 < step_seconds < math.inf:
        raise ValueError(f"step_seconds: {step_seconds} is not a number above 0")
    usable = all(0 < speed < math.inf for speed in speeds.values())
    if len(speeds) < 2 or not 1 <= first < AT_GPUS or not usable:
        raise ValueError(f"a curve has two numbers of GPUs or more, the smallest below {AT_GPUS}, and speeds above 0")
    gpus = np.array(sorted(speeds))
    longer = np.array([speeds[first] / speeds[n] for n in gpus.tolist()])
    # what is measured, weighted by its noise; then the prior, and that nothing becomes faster
    a = np.vstack([np.column_stack([np.ones(len(gpus)), _parts(gpus, first)]) / NOISE, np.diag([0, 1, 1]) / PRIOR])
    b = np.concatenate([longer / NOISE, [0, 0, 0]])
    base, *grown = np.linalg.lstsq(a, b, rcond=None)[0]
    latency, slowest = (max(0.0, float(part / base)) for part in grown)
    return Growth(first, latency, slowest, step_seconds)


@dataclass(frozen=True)
class Failures:
    """What a run on many GPUs is interrupted by. `mtbf_hours`: of one GPU, its machine's share included."""

    mtbf_hours: float = 50_000.0  # Llama 3's 16,384 H100 failed 419 times in 54 days: one in 50,000 GPU-hours
    checkpoint_seconds: float = 30.0  # that training stands still
    restart_seconds: float = 300.0

    def mean_seconds(self, gpus: int) -> float:
        """Between failures of the whole run."""
        return self.mtbf_hours * 3600 / gpus


def best_interval(failures: Failures, gpus: int) -> float:
    """Seconds of training between checkpoints that lose least (Daly 2006, equation 37)."""
    mean, cost = failures.mean_seconds(gpus), failures.checkpoint_seconds
    if cost >= 2 * mean:
        return mean
    part = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + part / 3 + part * part / 9) - cost


def goodput(failures: Failures, gpus: int, interval: float | None = None) -> float:
    """Share of the time that training goes on and is kept (Daly 2006, equation 20), at `interval` or the best one."""
    mean, cost = failures.mean_seconds(gpus), failures.checkpoint_seconds
    tau = best_interval(failures, gpus) if interval is None else interval
    try:
        return tau / (mean * math.exp(failures.restart_seconds / mean) * math.expm1((tau + cost) / mean))
    except OverflowError:  # it never gets as far as a checkpoint
        return 0.0


def simulate_goodput(failures: Failures, gpus: int, interval: float, hours: float, seed: int = 0) -> float:
    """The same by events: GPUs fail at random moments, what is not in a checkpoint is trained again, a restart that is
    interrupted begins anew. `hours` of wall clock."""
    drawn, end, rate = random.Random(seed), hours * 3600, 1 / failures.mean_seconds(gpus)
    now = kept = 0.0
    failure = drawn.expovariate(rate)  # the next one
    while now < end:
        saved = now + interval + failures.checkpoint_seconds
        if saved <= failure:
            now, kept = saved, kept + interval
            continue
        while True:  # until a restart is not interrupted
            now = failure + failures.restart_seconds
            failure += drawn.expovariate(rate)
            if failure >= now:
                break
    return kept / now
