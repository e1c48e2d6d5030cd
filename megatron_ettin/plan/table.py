"""Print a plan: the layouts as a table, their cost, and the YAML to paste."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_ettin.base.text import counted, format_count
from megatron_ettin.config.layouts import describe_empty_rows, full_batch_split
from megatron_ettin.plan.pipeline import run_row_slots
from megatron_ettin.plan.search import Planned, RejectedLayout

SECONDS_A_DAY = 86_400
SHOWN_REASONS = 5
# a plan warns if a GPU's speed is below this share of that on one host
LEAST_EFFICIENCY = 0.5
SHARES = ("bubble", "exposed_tp", "exposed_cp", "exposed_pp", "exposed_dp")


def phase_cost(best: Planned, price: float | None) -> dict[str, float]:
    """Return tokens, days, gpu_hours and, if `price` per GPU-hour is given, cost of the whole phase.

    An empty row slot in a smaller step of a batch warm-up costs as much as a row.
    """
    speed = best.tokens_per_second_per_gpu * best.gpus
    rows, slots = run_row_slots(best.config, best.dp)
    full = full_batch_split(best.config, best.dp)
    seconds = best.config.run.tokens / speed * (slots / rows) / (full.capacity / full.rows)
    hours = seconds / 3600 * best.gpus
    cost = {"tokens": best.config.run.tokens, "days": seconds / SECONDS_A_DAY, "gpu_hours": hours}
    return cost | ({"cost": hours * price} if price is not None else {})


def parallel_yaml(best: Planned) -> str:
    """Return the `parallel` and `batch` groups as YAML to paste into a --config file."""
    keys = ("tp", "pp", "vpp", "cp", "sequence_parallel", "distributed_optimizer", "overlap", "recompute")
    groups = {
        "parallel": {key: getattr(best.config.parallel, key) for key in keys},
        "batch": {"micro_batch_rows": best.config.batch.micro_batch_rows},
    }
    return str(yaml.safe_dump(groups, sort_keys=False)).rstrip()


def layout_name(one: Planned) -> str:
    """Return the degrees above 1, and dp, such as `tp 2 dp 256`."""
    parallel = one.config.parallel
    axes = {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp, "cp": parallel.cp, "dp": one.dp}
    return " ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1 or axis == "dp")


def print_plan(
    layouts: list[Planned],
    rejected: list[RejectedLayout],
    top: int,
    price: float | None,
    errors: list[dict[str, Any]],
    compared: tuple[int, float] | None,
) -> None:
    """Print the fastest layouts, then memory, cost and YAML of the best one.

    Args:
        layouts: the valid layouts, fastest first.
        rejected: the layouts that are not valid, with their reasons.
        top: number of layouts to print.
        price: price of a GPU-hour; None prints no cost.
        errors: errors of the step model, one for each run that it was calibrated with.
        compared: number of GPUs of one host, and the best layout's speed per GPU as a share of that host's; or None.
    """
    console, best = Console(soft_wrap=True, highlight=False, width=160), layouts[0]
    gpu = best.gpu
    console.print(
        f"{best.config.run.size} {best.config.run.objective} {best.config.run.phase} on {counted(best.gpus, 'GPU')}:"
        f" {gpu.name}, {gpu.bf16_tflops:g} TFLOPS in bf16, {gpu.memory_gib:g} GiB each; predicted, not measured"
    )
    columns = ("layout", "micro-batch", "tokens/s/GPU", "MFU", "step, s", "bubble", "tp", "cp", "pp", "dp", "GiB")
    table = Table(*columns, box=None, header_style="", pad_edge=False)
    for one in layouts[:top]:
        seconds = one.time
        shares = [getattr(seconds, part) for part in SHARES]
        again = ", recompute" if one.config.parallel.recompute != "none" else ""
        table.add_row(
            *(layout_name(one) + again, str(one.config.batch.micro_batch_rows)),
            *(f"{one.tokens_per_second_per_gpu:,.0f}", f"{one.mfu:.{1 if one.mfu >= 0.01 else 3}%}"),
            f"{seconds.total:.3f}",
            *(f"{share / seconds.total:.1%}" for share in shares),
            f"{one.memory.total_bytes / 2**30:.1f}",
        )
    console.print(table)
    console.print("bubble, tp, cp, pp, dp: shares of the step spent idle and in communication that nothing hides")
    if len(layouts) > top:
        console.print(f"... and {len(layouts) - top} slower ones (--top, --json)")
    console.print(advantage(layouts))
    if compared is not None:
        console.print(efficiency_line(best, *compared))
    if left := describe_empty_rows(best.config, best.dp):
        console.print(f"its batch: {left}")
    memory = dataclasses.asdict(best.memory)
    parts = ", ".join(f"{key.removesuffix('_bytes')} {value / 2**30:.1f}" for key, value in memory.items())
    console.print(f"memory of its fullest GPU, GiB: {parts}")
    cost = phase_cost(best, price)
    money = f", {cost['cost']:,.0f} at {price:g} an hour" if price is not None else ""
    console.print(
        f"{best.config.run.phase}: {format_count(best.config.run.tokens)} tokens in {cost['days']:,.1f} days,"
        f" {cost['gpu_hours']:,.0f} GPU-hours{money}"
    )
    for line in calibration_lines(errors):
        console.print(line)
    reasons = summary(rejected)
    for reason in reasons[:SHOWN_REASONS]:
        console.print(f"not: {reason}")
    if len(reasons) > SHOWN_REASONS:
        console.print(f"not: {counted(len(reasons) - SHOWN_REASONS, 'more reason')} (--json)")
    console.print("\n" + parallel_yaml(best))


def efficiency_line(best: Planned, gpus: int, share: float) -> str:
    """Return the line about a GPU's speed as a share of that on one host, as a warning if the share is small."""
    line = f"efficiency: {share:.0%} of a GPU's speed on {gpus}"
    if share >= LEAST_EFFICIENCY:
        return line
    rows = best.config.batch.global_batch_rows
    few = "row a step is" if rows == 1 else "rows a step are"
    return (
        f"warning: {line}; {rows:,} {few} few for {best.gpus:,} GPUs: take fewer (--scale shows where the"
        " speed goes) or a larger batch.global_batch_rows, which is another run"
    )


def advantage(layouts: list[Planned]) -> str:
    """Return the line that compares the best layout with the best of the other type.

    One type is pure data parallelism; the other splits the model.
    """
    best = layouts[0]
    plain = [one for one in layouts if one.gpus == one.dp]
    others = [one for one in layouts if (one.gpus == one.dp) != (best.gpus == best.dp)]
    name = "data parallelism with the distributed optimizer" if best in plain else layout_name(best)
    if not others:
        return f"fastest: {name}"
    ahead = best.tokens_per_second_per_gpu / others[0].tokens_per_second_per_gpu - 1
    return f"fastest: {name}, {ahead:.1%} ahead of {layout_name(others[0])}"


def summary(rejected: list[RejectedLayout]) -> list[str]:
    """Return one line for each reason of rejection, with the first few layouts that share it."""
    by_reason: dict[str, list[str]] = {}
    for one in rejected:
        by_reason.setdefault(one.reason, []).append(one.layout)
    return [f"{'; '.join(names[:4])}{' ...' * (len(names) > 4)}: {reason}" for reason, names in by_reason.items()]


def calibration_lines(errors: list[dict[str, Any]]) -> list[str]:
    """Return one line for each calibration run, with the predicted and the measured speed."""
    return [
        f"calibration: {row['run']}: {row['predicted']:,.0f} predicted, {row['measured']:,.0f} measured"
        f" ({row['error_percent']:+.1f} %)"
        for row in errors
    ]
