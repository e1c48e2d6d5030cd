"""Measure what the guards of a run cost a training step on the CPU. Steps with and without them take turns.

  python tools/bench_guards.py [--threads 2] [--rows 2] [--steps 30] [--size 17m] [--out docs/benchmarks/guards.md]

`judged`: loss and gradient norm are judged before the update, with a full window of 128 steps. `replicas`: the hashes
of all weights that ranks compare (`resilience.check_replicas_every`), without the exchange of one number per weight.
`recheck`: two more forward passes (`resilience.recheck`). A turn is one step of each side, in changing order.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

from bench_step import RandomRows


def build(size: str, rows: int) -> tuple[Any, Any]:
    """Build the train state and batches of one rank, fp32."""
    from megatron_ettin.batching.batches import Batches
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.train.setup import build_single_process

    overrides = f"precision.name=fp32 runtime.device=cpu batch.global_batch_rows={rows} batch.micro_batch_rows={rows}"
    config = parse(size, "mlm", "pretrain", overrides=[*overrides.split(), "batch.warmup_tokens=0"])
    train_state = build_single_process(config, training=True)
    return train_state, Batches.of(config, RandomRows(), train_state.layout, train_state.platform.device)  # type: ignore[arg-type]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a step with and without guards, and of the checks that are off by default."""
    import torch

    from megatron_ettin.config.operations import ResilienceConfig
    from megatron_ettin.faults.anomalies import AnomalyDetector
    from megatron_ettin.faults.consistency import replay_check, weight_bit_sums
    from megatron_ettin.train.progress import Progress
    from megatron_ettin.train.step import train_step

    torch.set_num_threads(args.threads)
    train_state, batches = build(args.size, args.rows)
    draw = random.Random(3)
    guard = AnomalyDetector(ResilienceConfig(), tuple(50 + draw.random() for _ in range(128)))
    seconds: dict[str, list[float]] = {"plain": [], "judged": []}
    for number in range(args.steps + 1):
        for side in draw.sample(sorted(seconds), len(seconds)):
            began = time.perf_counter()
            train_state.progress = Progress(number)
            assert train_step(train_state, batches, 1e-4, guard if side == "judged" else None).updated
            if number:  # the first is a warm-up
                seconds[side].append(time.perf_counter() - began)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    for name, call in (
        ("replicas", lambda: weight_bit_sums(train_state)),
        ("recheck", lambda: replay_check(train_state, batches, 0)),
    ):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        medians[name] = statistics.median(times)
    began = time.perf_counter()
    for _ in range(1000):
        guard.judge(50.0, 50.0), guard.after(50.0, 50.0)
    return medians | {"judgement alone": (time.perf_counter() - began) / 1000}


def table(args: argparse.Namespace, medians: dict[str, float]) -> str:
    plain = medians["plain"]
    lines = ["# Cost of the guards", "", f"`python tools/bench_guards.py --steps {args.steps} --rows {args.rows}`", ""]
    lines.append(
        f"{time.strftime('%Y-%m-%d')}; {args.threads} threads of {platform.machine()}; {args.size} shape, fp32,"
        f" {args.rows} rows of 1024 tokens, medians of {args.steps} steps a side."
    )
    lines += ["", "| | seconds | of a plain step |", "|---|---|---|"]
    lines += [f"| {name} | {value:.6f} | {value / plain:.4f} |" for name, value in medians.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", default="17m")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = table(args, measure(args))
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
