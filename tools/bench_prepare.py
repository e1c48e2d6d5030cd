"""How fast `ettin prepare` is here: tokens a second with 1 and with 2 workers, the whole command as a user runs it.

The text is the docstrings of the installed packages (examples/docstrings.py). Every figure is the median of three runs
from nothing to a published dataset with its row plan. Writes docs/benchmarks/prepare.md.

    python tools/bench_prepare.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3
WORKERS = (1, 2)
LEAST_BYTES = 10_000_000


@dataclass(frozen=True)
class Figure:
    workers: int
    seconds: list[float]  # of the whole command, start-up included
    cpu_seconds: list[float]  # of the command and its workers together: what a busy machine changes least
    tokens: int
    fill: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "prepare.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "docstrings.jsonl"
        subprocess.run([sys.executable, ROOT / "examples" / "docstrings.py", "--out", text], check=True)
        input_bytes = text.stat().st_size
        if input_bytes < LEAST_BYTES:
            raise SystemExit(f"{input_bytes} bytes of text, wanted {LEAST_BYTES}: install more packages")
        load_before = os.getloadavg()[0]
        figures = [measure(text, Path(folder) / "dataset", workers) for workers in WORKERS]
    report = page(figures, input_bytes, load_before)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report, encoding="utf-8")
    print(report)
    return 0


def measure(text: Path, out: Path, workers: int) -> Figure:
    seconds, cpu_seconds = [], []
    command = [sys.executable, "-m", "megatron_ettin", "prepare", text, "--out", out]
    command += ["--workers", str(workers), "--seq-len", "1024", "--json"]
    for _ in range(REPEATS):
        shutil.rmtree(out, ignore_errors=True)
        began, cpu_began = time.perf_counter(), children_cpu_seconds()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(children_cpu_seconds() - cpu_began)
    told = json.loads(done.stdout)
    return Figure(workers, seconds, cpu_seconds, told["tokens"], told["rows"][0]["fill"])


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def page(figures: list[Figure], input_bytes: int, load: float) -> str:
    rows = [
        f"| {figure.workers} | {statistics.median(figure.seconds):.1f} s | "
        f"{', '.join(f'{s:.1f}' for s in figure.seconds)} | {figure.tokens_per_second:,.0f} | "
        f"{statistics.median(figure.cpu_seconds):.1f} s |"
        for figure in figures
    ]
    cpus = len(os.sched_getaffinity(0))
    busy = ["", "Other work was running: the times are not those of an idle machine."] if load > cpus / 2 else []
    return "\n".join(
        [
            "# `ettin prepare`: speed",
            "",
            f"Command: `python tools/bench_prepare.py`, on {cpus} CPU cores ({platform.machine()}), Python "
            f"{platform.python_version()}, load average {load:.1f} before the first run.",
            f"Input: {input_bytes / 1e6:.1f} MB of .jsonl, the docstrings of installed packages, "
            f"{figures[0].tokens:,} tokens after chunking.",
            "Each figure is the whole command, process start-up and the row plan of 1,024 included; median of three.",
            "",
            "| workers | median | runs (s) | tokens/s | CPU time |",
            "|---|---|---|---|---|",
            *rows,
            *busy,
            "",
            f"Rows of 1,024 tokens: {figures[0].fill:.2%} full.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
