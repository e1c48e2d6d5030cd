"""Compare core's engine with DeepSpeed's: steps of the same run on the same ranks, through `ettin train`.

  python tools/bench_engines.py --data DATASET [--ranks 2] [--rounds 3] [--steps 6] [--out docs/benchmarks/engines.md]
      [-- key=value ...]

The engines take turns. A run's figure is the median of its steps without the first two, an engine's that of its runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SIDES = {
    "megatron, data parallel": "parallel.distributed_optimizer=false",
    "megatron, distributed optimizer": "parallel.distributed_optimizer=true",
    "deepspeed, ZeRO-1": "parallel.engine=deepspeed parallel.zero_stage=1",
    "deepspeed, ZeRO-2": "parallel.engine=deepspeed parallel.zero_stage=2",
    "deepspeed, ZeRO-3": "parallel.engine=deepspeed parallel.zero_stage=3",
    "deepspeed, ZeRO-3, all offloaded": "parallel.engine=deepspeed parallel.zero_stage=3 parallel.zero_offload=all",
}
OVERRIDES = (
    "batch.global_batch_rows=8 batch.micro_batch_rows=2 batch.warmup_tokens=0 precision.name=fp32"
    " checkpoint.every_tokens=null metrics.tensorboard=false"
)


def run(arguments: argparse.Namespace, overrides: str, folder: Path) -> tuple[float, float]:
    """Train one run and return (seconds per step, peak GiB of the first rank)."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)),
        *("-m", "megatron_ettin", "train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain"),
        *("--run-dir", str(folder), f"data.mixture={arguments.data}", f"run.steps={arguments.steps}"),
        *(*OVERRIDES.split(), *arguments.overrides, *overrides.split()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{overrides}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(line["step_seconds"] for line in lines[2:])
    return seconds, lines[-1]["peak_memory_bytes"] / 2**30


def report(figures: dict[str, list[tuple[float, float]]], command: str) -> str:
    middle = {side: statistics.median(seconds for seconds, _ in runs) for side, runs in figures.items()}
    first = next(iter(middle.values()))
    rows = [
        f"| {side} | {middle[side]:.2f} ({min(runs)[0]:.2f} to {max(runs)[0]:.2f}) | {middle[side] / first:.2f} |"
        f" {statistics.median(memory for _, memory in runs):.2f} |"
        for side, runs in figures.items()
    ]
    head = "| engine | seconds a step, median (least to most) | ratio | GiB of a rank, peak |\n|---|---|---|---|"
    where = f"{time.strftime('%Y-%m-%d')}; gloo, one thread a rank, torch {version('torch')}, 17m shape, fp32."
    return "\n".join(["# Engines", "", f"`{command}`", "", where, "", head, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value of every run")
    arguments = parser.parse_args()
    figures: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side, overrides in SIDES.items():
            with tempfile.TemporaryDirectory() as folder:
                figures[side].append(run(arguments, overrides, Path(folder) / "run"))
            print(f"round {number + 1}: {side}: {figures[side][-1][0]:.2f} s", flush=True)
    shown = [f"--data DATASET --ranks {arguments.ranks} --rounds {arguments.rounds} --steps {arguments.steps}"]
    text = report(
        figures,
        " ".join(
            ["python tools/bench_engines.py", *shown, *(["--", *arguments.overrides] * bool(arguments.overrides))]
        ),
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
