"""Predict a run's speed, efficiency and goodput on growing numbers of GPUs (`ettin plan --scale`).

Strong scaling keeps the recipe's batch. Weak scaling gives each GPU as many rows as it would have of that batch on
AT_GPUS GPUs. A layout with pipeline stages is simulated pass by pass (pipeline.py).

Two costs grow with the number of GPUs. A collective takes a latency for each rank that it passes (step_time.py
computes it from the links). A step waits for the slowest rank, whose expected slowness is that of the largest of n
normal draws. A measured weak-scaling curve gives the size of both, and the weak-scaling column continues it. The
least-squares fit has a prior of one percent of a step for each at 64 GPUs, because the few points that are usually
measured cannot separate them. Failures and checkpoints follow Daly 2006 (Future Generation Computer Systems 22).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.base import plots
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.layouts import micro_batches
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.pipeline import simulate
from megatron_ettin.plan.search import Planned, nearest_miss, search
from megatron_ettin.plan.step_time import StepModel
from megatron_ettin.plan.table import layout_name

# number of GPUs at which both costs are given, relative to the smallest measured number
AT_GPUS = 64
# usual size of each cost at AT_GPUS as a share of a step, and the relative error of a measured speed
PRIOR, NOISE = 0.01, 0.005
MOST_GPUS = 65_536
LEAST_GOODPUT = 0.001
# simulated groups of as many micro-batches as there are ranks; all later groups take equally long
SIMULATED_GROUPS = 12


@dataclass(frozen=True)
class ScalingCurve:
    """Growth of a step's seconds from `first` GPUs to n."""

    first: int
    latency: float | None = None
    """Latency at AT_GPUS as a share of a step; None: not measured, so the latencies of the links are used."""
    slowest: float = PRIOR
    """Share of a step at AT_GPUS that is spent waiting for the slowest rank."""
    step_seconds: float | None = None
    """Seconds of the step that the shares refer to; None: the predicted step on `first` GPUs."""

    def slowest_at(self, gpus: int) -> float:
        """Return how long a step waits for the slowest of `gpus` ranks, as a share of its arithmetic's seconds."""
        return max(0.0, float(self.slowest * _growth_terms(np.array([gpus]), self.first)[0, 1]))

    def latency_seconds(self, ranks: int, step_seconds: float) -> float:
        """Return by how many seconds the latency over `ranks` ranks exceeds that over `first` ranks.

        Args:
            ranks: ranks of the collectives.
            step_seconds: seconds of a step on `first` GPUs, used if the curve has none.
        """
        linear = float(_growth_terms(np.array([ranks]), self.first)[0, 0])
        return max(0.0, (self.latency or 0.0) * linear) * (self.step_seconds or step_seconds)

    def factor(self, gpus: int) -> float:
        """Return the seconds of a step divided by those on `first` GPUs, at the same work per GPU."""
        return 1 + self.latency_seconds(gpus, 1.0) / (self.step_seconds or 1.0) + self.slowest_at(gpus)


def _growth_terms(gpus: plots.Values, first: int) -> plots.Values:
    """Return the growth of latency and of the slowest rank [n, 2] at GPU counts [n]: 0 at `first`, 1 at AT_GPUS."""
    linear = (gpus - first) / (AT_GPUS - first)

    def largest(n: plots.Values | float) -> Any:
        """Approximate the largest of n standard normal draws."""
        return np.sqrt(2 * np.log(np.maximum(n, 1.0)))

    return np.stack([linear, (largest(gpus) - largest(float(first))) / (largest(AT_GPUS) - largest(first))], axis=1)


def fit_curve(speeds: Mapping[int, float], step_seconds: float | None = None) -> ScalingCurve:
    """Fit a curve to measured weak scaling.

    Args:
        speeds: number of GPUs -> tokens per second of each; two numbers or more, the smallest below AT_GPUS.
        step_seconds: seconds of a step on the smallest number; None if unknown.

    Raises:
        ValueError: the speeds or the seconds cannot be used.
    """
    first = min(speeds, default=AT_GPUS)
    if step_seconds is not None and not 0 < step_seconds < math.inf:
        raise ValueError(f"step_seconds: {step_seconds} is not a number above 0")
    usable = all(0 < speed < math.inf for speed in speeds.values())
    if len(speeds) < 2 or not 1 <= first < AT_GPUS or not usable:
        raise ValueError(f"a curve has two numbers of GPUs or more, the smallest below {AT_GPUS}, and speeds above 0")
    gpus = np.array(sorted(speeds))
    longer = np.array([speeds[first] / speeds[n] for n in gpus.tolist()])
    # rows: the measurements, weighted by their noise; then the prior, which pulls both costs towards 0
    a = np.vstack(
        [np.column_stack([np.ones(len(gpus)), _growth_terms(gpus, first)]) / NOISE, np.diag([0, 1, 1]) / PRIOR]
    )
    b = np.concatenate([longer / NOISE, [0, 0, 0]])
    base, *grown = np.linalg.lstsq(a, b, rcond=None)[0]
    latency, slowest = (max(0.0, float(part / base)) for part in grown)
    return ScalingCurve(first, latency, slowest, step_seconds)


@dataclass(frozen=True)
class FailureModel:
    """Interruptions of a run on many GPUs."""

    mtbf_hours: float = 50_000.0
    """Hours between failures of one GPU, its host's share included. Llama 3's 16,384 H100 failed 419 times in 54 days,
    which is once in 50,000 GPU-hours.
    """
    checkpoint_seconds: float = 30.0
    """Seconds that training stands still for a checkpoint."""
    restart_seconds: float = 300.0
    """Seconds from a failure until training continues."""

    def mean_seconds(self, gpus: int) -> float:
        """Return the mean seconds between failures of the whole run."""
        return self.mtbf_hours * 3600 / gpus


def best_interval(failures: FailureModel, gpus: int) -> float:
    """Return the seconds of training between checkpoints that lose least (Daly 2006, equation 37)."""
    mean, cost = failures.mean_seconds(gpus), failures.checkpoint_seconds
    if cost >= 2 * mean:
        return mean
    part = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + part / 3 + part * part / 9) - cost


def goodput(failures: FailureModel, gpus: int, interval: float | None = None) -> float:
    """Return the share of time whose training is kept (Daly 2006, equation 20).

    `interval`: seconds of training between checkpoints, by default those of `best_interval`.
    """
    mean, cost = failures.mean_seconds(gpus), failures.checkpoint_seconds
    tau = best_interval(failures, gpus) if interval is None else interval
    try:
        return tau / (mean * math.exp(failures.restart_seconds / mean) * math.expm1((tau + cost) / mean))
    except OverflowError:
        # failures are so frequent that no checkpoint is reached
        return 0.0


@dataclass(frozen=True)
class ScalingRow:
    """Prediction of a run on one number of GPUs. Efficiencies are relative to the first row's."""

    gpus: int
    layout: str
    strong_tokens_per_second_per_gpu: float
    strong_efficiency: float
    weak_tokens_per_second_per_gpu: float
    weak_efficiency: float
    step_seconds: float
    """Seconds of a step of the recipe's batch."""
    goodput: float
    checkpoint_every_seconds: float
    phase_days: float
    gpu_hours: float
    cost: float | None = None
    """Cost of the phase; None without a price per GPU-hour."""


def parse_gpu_counts(text: str) -> list[int]:
    """Parse `8:4096` to 8, 16, ..., 4096, and `96,4608` to those numbers. Raises UserError."""
    parts = text.replace(":", ",", 1).split(",")
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    rising = numbers == sorted(numbers) and min(numbers, default=0) >= 1 and max(numbers) <= MOST_GPUS
    if len(numbers) != len(parts) or not rising or (":" in text and len(numbers) != 2):
        raise UserError(f"--scale {text}: write FIRST:LAST or N,N,..., rising, such as 8:4096, up to {MOST_GPUS}")
    if ":" not in text:
        return numbers
    first, last = numbers
    return [first * 2**n for n in range((last // first).bit_length())]


def read_curve(path: Path) -> ScalingCurve:
    """Read a curve from a JSON object of numbers of GPUs -> tokens per second of each GPU.

    The object may also have the `step_seconds` of the smallest number.

    Raises:
        UserError: the file cannot be read or fitted.
    """
    try:
        content = dict(load_json(path.read_text(encoding="utf-8")))
        seconds = content.pop("step_seconds", None)
        speeds = {int(gpus): float(speed) for gpus, speed in content.items()}
        return fit_curve(speeds, None if seconds is None else float(seconds))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--curve {path}: {error}") from None


def scaling_rows(
    config: Config,
    model: StepModel,
    numbers: Sequence[int],
    growth: ScalingCurve,
    failures: FailureModel,
    given: Set[str] = frozenset(),
) -> list[ScalingRow]:
    """Predict the run on each number of GPUs that has a valid layout.

    Args:
        config: the run.
        model: predicts the seconds of a step.
        numbers: numbers of GPUs, rising.
        growth: growth of a step's seconds with the number of GPUs.
        failures: rate of failures, and the cost of checkpoints and restarts.
        given: keys that the search may not change, even if they have their defaults.

    Raises:
        UserError: no number has a valid layout, or failures leave nothing of the run.
    """
    if growth.latency is not None:
        # the measured latency includes that of the links, which would count twice
        model = dataclasses.replace(model, gpu=dataclasses.replace(model.gpu, link_us=0.0, network_us=0.0))
    rows_a_gpu = max(1, config.batch.global_batch_rows // AT_GPUS)
    lacking: list[str] = []

    def fastest(gpus: int, weak: bool) -> Planned | None:
        scaled = config.with_keys({"batch.global_batch_rows": rows_a_gpu * gpus}) if weak else config
        layouts, rejected = search(scaled, gpus, model, given)
        if not layouts:
            lacking.append(f"{gpus}: {nearest_miss(rejected)}")
        return layouts[0] if layouts else None

    base = fastest(growth.first, weak=True)
    rows: list[ScalingRow] = []
    for gpus in numbers:
        strong, weak = fastest(gpus, weak=False), fastest(gpus, weak=True)
        if strong is None or weak is None:
            continue
        seconds = step_seconds(strong, model, growth, (base or strong).time.total)
        speed = _step_tokens(strong) / gpus / seconds
        weak_speed = _step_tokens(weak) / gpus / step_seconds(weak, model, growth, (base or weak).time.total)
        if growth.latency is not None and base is not None:
            weak_speed = base.tokens_per_second_per_gpu / growth.factor(gpus)
        kept = goodput(failures, gpus)
        if kept < LEAST_GOODPUT:
            raise UserError(
                f"--scale: one of {gpus} GPUs fails every {failures.mean_seconds(gpus):.3g} s, so nothing is kept;"
                " relax --mtbf-hours, --checkpoint-seconds or --restart-seconds"
            )
        phase_seconds = config.run.tokens / (speed * gpus * kept)
        rows.append(
            ScalingRow(
                gpus=gpus,
                layout=layout_name(strong),
                strong_tokens_per_second_per_gpu=speed,
                strong_efficiency=speed / rows[0].strong_tokens_per_second_per_gpu if rows else 1.0,
                weak_tokens_per_second_per_gpu=weak_speed,
                weak_efficiency=weak_speed / rows[0].weak_tokens_per_second_per_gpu if rows else 1.0,
                step_seconds=seconds,
                goodput=kept,
                checkpoint_every_seconds=best_interval(failures, gpus),
                phase_days=phase_seconds / 86_400,
                gpu_hours=phase_seconds / 3600 * gpus,
            )
        )
    if not rows:
        raise UserError(f"--scale: none of {numbers[0]} to {numbers[-1]} GPUs has a valid layout; {lacking[-1]}")
    return rows


def _step_tokens(one: Planned) -> float:
    """Return the tokens of a step."""
    return one.config.batch.global_batch_rows * one.row_tokens


def step_seconds(one: Planned, model: StepModel, growth: ScalingCurve, first_seconds: float) -> float:
    """Return the seconds of a step of a layout, including the wait for the slowest rank.

    Args:
        one: the layout.
        model: the model that predicted it.
        growth: growth of a step's seconds with the number of GPUs.
        first_seconds: seconds of a step on the curve's first number of GPUs.
    """
    parallel, count = one.config.parallel, micro_batches(one.config, one.dp)
    slower = 1 + growth.slowest_at(one.gpus)
    latency = growth.latency_seconds(one.dp * parallel.cp, first_seconds)
    if parallel.pp == 1:
        return one.time.total + latency + (slower - 1) * one.time.compute
    # seconds of the busiest rank's passes
    within = one.time.compute + one.time.exposed_tp + one.time.exposed_cp
    rest = one.time.total - within - one.time.bubble - one.time.exposed_pp
    stages = [model.constants.seconds(stage) for stage in model.stage_work(one.config, one.dp)]
    busiest = max(sum(stages[rank :: parallel.pp]) for rank in range(parallel.pp))
    stages = [slower * within / count * seconds / busiest for seconds in stages]
    hop = model.hop_seconds(one.config, one.dp)
    return rest + latency + simulated_seconds(stages, count, parallel.pp, parallel.recompute == "full", hop)


def simulated_seconds(stages: Sequence[float], count: int, ranks: int, recompute: bool, hop: float) -> float:
    """Return the seconds of `count` micro-batches in a pipeline.

    Only the first few micro-batches are simulated. Each later one takes as long as the busiest rank computes for it.

    Args:
        stages: seconds of forward and backward of one micro-batch on each stage, in model order.
        count: number of micro-batches.
        ranks: number of pipeline ranks.
        recompute: whether backward computes the forward pass again.
        hop: seconds to send a micro-batch to the next stage.
    """
    few = min(count, SIMULATED_GROUPS * ranks + count % ranks)
    forward = 1 / 4 if recompute else 1 / 3
    seconds, busy = simulate(
        [forward * seconds for seconds in stages], [(1 - forward) * seconds for seconds in stages], few, ranks, hop
    )
    return seconds + (count - few) * max(busy) / few


def table(rows: Sequence[ScalingRow]) -> str:
    """Return the rows as a table of text."""
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


def picture(rows: Sequence[ScalingRow], title: str) -> bytes:
    """Return a PNG of efficiency by number of GPUs, strong and weak, and goodput."""
    gpus = np.array([row.gpus for row in rows], float)
    curves = {
        "weak scaling": [row.weak_efficiency for row in rows],
        "strong scaling, the recipe's batch": [row.strong_efficiency for row in rows],
        "goodput": [row.goodput for row in rows],
    }
    panel = plots.Panel(
        title,
        "GPUs",
        [plots.Curve(name, i, [(gpus, np.array(y))], is_sparse=True) for i, (name, y) in enumerate(curves.items())],
        from_zero=True,
        percent=True,
        log_base=2,
        x_ticks=[row.gpus for row in rows],
    )
    return plots.draw_row([panel], 9, 5)
