"""Measure the seconds from a command to its answer: `ettin --help`, each command's `--help`, a dry run, errors.

  python tools/bench_startup.py [--repeats 5] [--out docs/benchmarks/startup.md]

Each command is a process of its own; figures are medians of `repeats`. Libraries such as torch are imported only if
they are needed, because a command that answers from the configuration alone must not wait for them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from megatron_ettin.cli.main import COMMANDS

TRAIN = ["train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain"]
CASES = {
    "ettin --help": ["--help"],
    "ettin --version": ["--version"],
    **{f"ettin {name} --help": [name, "--help"] for name in COMMANDS},
    "ettin train ... --dry-run": [*TRAIN, "--dry-run"],
    "ettin train ... optim.lrr=1 (refused)": [*TRAIN, "optim.lrr=1"],
}
MODULES = ("torch", "megatron.core", "transformers", "megatron_ettin.train.trainer")


def seconds(command: list[str], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        "# Seconds to start",
        "",
        f"`python tools/bench_startup.py --repeats {args.repeats}`, {time.strftime('%Y-%m-%d')}; medians.",
        "",
        "| command | seconds |",
        "|---|---|",
    ]
    start = [sys.executable, "-m", "megatron_ettin"]
    lines += [f"| `{name}` | {seconds([*start, *arguments], args.repeats):.2f} |" for name, arguments in CASES.items()]
    lines += ["", "| import in a fresh interpreter | seconds |", "|---|---|"]
    lines += [
        f"| `{module}` | {seconds([sys.executable, '-W', 'ignore', '-c', f'import {module}'], args.repeats):.2f} |"
        for module in MODULES
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
