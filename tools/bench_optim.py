"""Compare the optimizers' update alone: our three and torch's AdamW (foreach), with the same parameters and gradients.

  python tools/bench_optim.py [--size 17m] [--device cpu] [--rounds 9] [--out docs/benchmarks/optim.md]

fp32 weights. The optimizers take turns within one process; the figure is the median round.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ettin.config.resolve import parse
from megatron_ettin.optim.megatron import build_optimizer
from megatron_ettin.parallel.groups import optimizer_groups
from megatron_ettin.platform import Platform
from megatron_ettin.train.setup import TrainState, build_single_process, wrap

OURS, TORCH = ("stable_adamw", "adamw", "muon"), "torch.optim.AdamW, foreach"


def ours(train_state: TrainState, name: str) -> Callable[[], None]:
    """Return a function that does one update of one of our optimizers."""
    optim = dataclasses.replace(train_state.config.optim, name=name)
    wrapped = wrap(train_state.config, train_state.model_chunks)
    groups = optimizer_groups(False)
    optimizer = build_optimizer(wrapped, optim, False, False, groups, train_state.platform.device)
    for chunk in wrapped:
        for p in chunk.parameters():
            if p.requires_grad:
                p.main_grad.normal_(std=1e-3)  # type: ignore[attr-defined]

    def step() -> None:
        optimizer.prepare()
        optimizer.update(1e-6)
        optimizer.norm()

    return step


def theirs(train_state: TrainState) -> Callable[[], None]:
    """Return a function that does one update of torch's AdamW, and computes the gradient norm as ours does."""
    parameters = [
        p.detach().clone().requires_grad_() for p in train_state.model_chunks[0].parameters() if p.requires_grad
    ]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, foreach=True)

    def step() -> None:
        float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
        optimizer.step()

    return step


def median_seconds(sides: dict[str, Callable[[], None]], rounds: int, platform: Platform) -> dict[str, float]:
    """Return each optimizer's median seconds of an update; they take turns, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, step in sides.items():
            platform.synchronize()
            began = time.perf_counter()
            step()
            platform.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="17m")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    overrides = ["precision.name=fp32", f"runtime.device={options.device}", "parallel.distributed_optimizer=false"]
    train_state = build_single_process(parse(options.size, "mlm", "pretrain", overrides=overrides))
    sides = {**{name: ours(train_state, name) for name in OURS}, TORCH: theirs(train_state)}
    seconds = median_seconds(sides, options.rounds, train_state.platform)
    lines = [
        "# The optimizers' update",
        "",
        f"`python tools/bench_optim.py --size {options.size} --device {options.device} --rounds {options.rounds}`",
        "",
        f"{time.strftime('%Y-%m-%d')}; {train_state.platform.name}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}; {options.size}, fp32, one process, gradient norm included.",
        "",
        "| optimizer | seconds (median) | of torch's AdamW |",
        "|---|---|---|",
        *(f"| {name} | {value:.4f} | {value / seconds[TORCH]:.2f} |" for name, value in seconds.items()),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
