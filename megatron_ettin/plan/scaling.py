"""From a layout's step on few GPUs to one on thousands: what grows with their number, and what failures leave of it.

Two things grow. Collectives take a latency for each rank that they pass (step_time.py has it from the links' own), and
a step waits for the slowest of all ranks, whose expected slowness is that of the largest of n draws. A curve of
measured speeds (weak scaling) tells how much of each: the fit is a least-squares one with a prior of one percent of a
step for both at 64 GPUs, because the few points that are usually measured cannot tell them apart. Failures and
checkpoints follow Daly 2006 (Future Generation Computer Systems 22), and a simulation of weeks is held against it.

`ettin plan --scale`: the fastest layout, speed, efficiency and goodput of a run on growing numbers of GPUs.

Strong scaling keeps the recipe's batch; weak scaling gives each GPU the rows that it has of that batch on AT_GPUS. A
layout with pipeline stages is simulated pass by pass (pipeline.py). A measured curve is one of weak scaling, all that
grows with the number of GPUs included: that column is its continuation."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.layouts import micro_batches
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.hardware import Gpu
from megatron_ettin.plan.pipeline import simulate
from megatron_ettin.plan.search import Planned, nearest_miss, search
from megatron_ettin.plan.step_time import Constants, hop_seconds, stage_features
from megatron_ettin.plan.table import layout_name

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


MOST_GPUS = 65_536
LEAST_GOODPUT = 0.001
SIMULATED_GROUPS = 12  # of as many micro-batches as ranks; from then on all groups take equally long


@dataclass(frozen=True)
class Scaled:
    """A run on so many GPUs. Speeds are tokens a second of each GPU; efficiencies relative to the first row's."""

    gpus: int
    layout: str
    strong_tokens_per_second_per_gpu: float
    strong_efficiency: float
    weak_tokens_per_second_per_gpu: float
    weak_efficiency: float
    step_seconds: float  # of the recipe's batch
    goodput: float
    checkpoint_every_seconds: float
    phase_days: float
    gpu_hours: float
    cost: float | None = None  # of the phase, where a GPU's hour has a price


def numbers_of(text: str) -> list[int]:
    """`8:4096` -> 8, 16, ..., 4096; `96,4608` -> those. Raises UserError."""
    parts = text.replace(":", ",", 1).split(",") if ":" in text else text.split(",")
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    rising = numbers == sorted(numbers) and min(numbers, default=0) >= 1 and max(numbers) <= MOST_GPUS
    if len(numbers) != len(parts) or not rising or (":" in text and len(numbers) != 2):
        raise UserError(f"--scale {text}: write FIRST:LAST or N,N,..., rising, such as 8:4096, up to {MOST_GPUS}")
    if ":" not in text:
        return numbers
    first, last = numbers
    return [first * 2**n for n in range((last // first).bit_length())]


def read_curve(path: Path) -> Growth:
    """From a JSON object of numbers of GPUs and the tokens a second of each of them, and `step_seconds` of the first
    where it is known. Raises UserError."""
    try:
        content = dict(load_json(path.read_text(encoding="utf-8")))
        seconds = content.pop("step_seconds", None)
        speeds = {int(gpus): float(speed) for gpus, speed in content.items()}
        return fit(speeds, None if seconds is None else float(seconds))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--curve {path}: {error}") from None


def scaled(
    config: Config, gpu: Gpu, numbers: Sequence[int], growth: Growth, failures: Failures, constants: Constants,
    chunk_tokens: float, node: int, given: Set[str] = frozenset(),
) -> list[Scaled]:  # fmt: skip
    """A row for each number of GPUs that has a valid layout. Raises UserError where none has."""
    if growth.latency is not None:  # measured: the links' own would count it twice
        gpu = dataclasses.replace(gpu, link_us=0.0, network_us=0.0)
    rows_a_gpu = max(1, config.batch.global_batch_rows // AT_GPUS)

    lacking: list[str] = []

    def fastest(one: Config, gpus: int) -> Planned | None:
        found, rejected = search(one, gpus, gpu, constants, chunk_tokens, node, given)
        if not found:
            lacking.append(f"{gpus}: {nearest_miss(rejected)}")
        return found[0] if found else None

    def weak(gpus: int) -> Planned | None:
        return fastest(config.with_keys({"batch.global_batch_rows": rows_a_gpu * gpus}), gpus)

    base = weak(growth.first)
    rows: list[Scaled] = []
    for gpus in numbers:
        found = fastest(config, gpus), weak(gpus)
        if found[0] is None or found[1] is None:
            continue
        speeds = [
            one.config.batch.global_batch_rows
            * one.row_tokens
            / gpus
            / step_seconds(one, constants, node, growth, (base or one).time.total)
            for one in found
            if one is not None
        ]
        if growth.latency is not None and base is not None:
            speeds[1] = base.tokens_per_second_per_gpu / growth.factor(gpus)
        rows.append(_row(config, found[0], gpus, speeds, rows[0] if rows else None, failures))
    if not rows:
        raise UserError(f"--scale: none of {numbers[0]} to {numbers[-1]} GPUs has a valid layout; {lacking[-1]}")
    return rows


def step_seconds(one: Planned, constants: Constants, node: int, growth: Growth, first_seconds: float) -> float:
    """Of a step of that layout, the slowest rank waited for. `first_seconds`: of a step on the curve's first number."""
    parallel, count = one.config.parallel, micro_batches(one.config, one.dp)
    slower = 1 + growth.slowest_at(one.gpus)
    latency = growth.latency_seconds(one.dp * parallel.cp, first_seconds)
    if parallel.pp == 1:
        return one.time.total + latency + (slower - 1) * one.time.compute
    within = one.time.compute + one.time.exposed_tp + one.time.exposed_cp  # of the busiest rank's passes
    rest = one.time.total - within - one.time.bubble - one.time.exposed_pp
    stages = [constants.seconds(stage) for stage in stage_features(one.config, one.gpu, one.dp, one.chunk_tokens)]
    busiest = max(sum(stages[rank :: parallel.pp]) for rank in range(parallel.pp))
    stages = [slower * within / count * seconds / busiest for seconds in stages]
    hop = hop_seconds(one.config, one.gpu, one.dp, node)
    return rest + latency + simulated_seconds(stages, count, parallel.pp, parallel.recompute == "full", hop)


def simulated_seconds(stages: Sequence[float], count: int, ranks: int, recompute: bool, hop: float) -> float:
    """Of the passes of `count` micro-batches over `stages`, the first few simulated: those after them take what their
    busiest rank does."""
    few = min(count, SIMULATED_GROUPS * ranks + count % ranks)
    forward = 1 / 4 if recompute else 1 / 3
    found = simulate(
        [forward * seconds for seconds in stages], [(1 - forward) * seconds for seconds in stages], few, ranks, hop
    )
    return found.seconds + (count - few) * max(found.busy_seconds) / few


def _row(
    config: Config, strong: Planned, gpus: int, speeds: Sequence[float], first: Scaled | None, failures: Failures
) -> Scaled:
    kept = goodput(failures, gpus)
    if kept < LEAST_GOODPUT:
        raise UserError(
            f"--scale: one of {gpus} GPUs fails every {failures.mean_seconds(gpus):.3g} s, so nothing is kept; relax"
            " --mtbf-hours, --checkpoint-seconds or --restart-seconds"
        )
    seconds = config.run.tokens / (speeds[0] * gpus * kept)
    return Scaled(
        gpus=gpus,
        layout=layout_name(strong),
        strong_tokens_per_second_per_gpu=speeds[0],
        strong_efficiency=speeds[0] / first.strong_tokens_per_second_per_gpu if first else 1.0,
        weak_tokens_per_second_per_gpu=speeds[1],
        weak_efficiency=speeds[1] / first.weak_tokens_per_second_per_gpu if first else 1.0,
        step_seconds=strong.config.batch.global_batch_rows * strong.row_tokens / gpus / speeds[0],
        goodput=kept,
        checkpoint_every_seconds=best_interval(failures, gpus),
        phase_days=seconds / 86_400,
        gpu_hours=seconds / 3600 * gpus,
    )


def priced(rows: Sequence[Scaled], price: float | None) -> list[Scaled]:
    """With what the phase costs, where a GPU's hour has a price."""
    return [dataclasses.replace(row, cost=None if price is None else row.gpu_hours * price) for row in rows]


def table(rows: Sequence[Scaled]) -> str:
    lines = [
        "  GPUs  layout                  tokens/s/GPU  strong    weak   step, s  goodput  checkpoint  phase, days"
        f"  GPU-hours{'        cost' * (rows[0].cost is not None)}"
    ]
    for row in rows:
        every = f"{row.checkpoint_every_seconds / 60:.0f} min"
        speed = f"{row.strong_tokens_per_second_per_gpu:12,.0f}"
        lines.append(
            f"{row.gpus:6,}  {row.layout:22}  {speed}  {row.strong_efficiency:6.1%}"
            f"  {row.weak_efficiency:6.1%}  {row.step_seconds:8.3f}  {row.goodput:7.2%}  {every:>10}"
            f"  {row.phase_days:11,.1f}  {row.gpu_hours:9,.0f}{f'  {row.cost:10,.0f}' if row.cost is not None else ''}"
        )
    return "\n".join(lines)


def picture(rows: Sequence[Scaled], title: str) -> bytes:
    """PNG: efficiency by number of GPUs, strong and weak, and goodput."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    gpus = [row.gpus for row in rows]
    for name, values in (
        ("weak scaling", [row.weak_efficiency for row in rows]),
        ("strong scaling, the recipe's batch", [row.strong_efficiency for row in rows]),
        ("goodput", [row.goodput for row in rows]),
    ):
        axes.plot(gpus, values, "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{n:,}" for n in gpus])
    axes.set(title=title, xlabel="GPUs", ylim=(0, 1.05))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
