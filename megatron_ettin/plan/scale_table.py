"""`ettin plan --scale`: the fastest layout, speed, efficiency and goodput of a run on growing numbers of GPUs.

Strong scaling keeps the recipe's batch; weak scaling gives each GPU the rows that it has of that batch on AT_GPUS. A
layout with pipeline stages is simulated pass by pass (pipeline.py). A measured curve is one of weak scaling, all that
grows with the number of GPUs included: that column is its continuation."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.json_reading import load_json
from megatron_ettin.config.layouts import micro_batches
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.hardware import Gpu
from megatron_ettin.plan.pipeline import simulate
from megatron_ettin.plan.scaling import AT_GPUS, Failures, Growth, best_interval, fit, goodput
from megatron_ettin.plan.search import Planned, nearest_miss, search
from megatron_ettin.plan.step_time import Constants, hop_seconds, stage_features
from megatron_ettin.plan.table import layout_name

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
        batch = dataclasses.replace(config.batch, global_batch_rows=rows_a_gpu * gpus)
        return fastest(dataclasses.replace(config, batch=batch), gpus)

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
