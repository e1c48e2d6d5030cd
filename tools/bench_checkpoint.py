"""Measure what a checkpoint costs a run on one CPU rank: how long training waits for asynchronous and for synchronous
saves, and how long verifying and loading take.

  python tools/bench_checkpoint.py [--size 150m] [--layers N] [--rows 1] [--rounds 3] [--only loads] [--out FILE.md]

fp32, StableAdamW, rows of 1,024 tokens. A round saves once each way, in changing order, with four steps after each:
`wait` is how long `Saver.begin` blocks training, `steps after` is how much longer the four steps took than four without
a save (writing takes CPU time too, which shows with two threads). Verifying is the sha256 of every file, alone and
concurrently with the load, which is into the same layout. Files are in the page cache, as right after a save, or come
from the disk where the table says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step import RandomRows

# steps after each save
AFTER = 4
LOADS = ["load", "load and verify", "load from the disk", "load and verify from the disk"]


def build(args: argparse.Namespace) -> tuple[Any, Any]:
    from megatron_ettin.batching.batches import Batches
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.train.setup import build_single_process

    overrides = f"precision.name=fp32 runtime.device=cpu batch.global_batch_rows={args.rows} batch.warmup_tokens=0"
    overrides += f" batch.micro_batch_rows={args.rows}" + (f" model.num_layers={args.layers}" if args.layers else "")
    config = parse(args.size, "mlm", "pretrain", overrides=overrides.split())
    train_state = build_single_process(config, training=True)
    return train_state, Batches.of(config, RandomRows(), train_state.layout, train_state.platform.device)  # type: ignore[arg-type]


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drop a checkpoint's files from the page cache, so that reads come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Bench:
    """One run, the folder that it saves into, and the seconds of each operation."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder, self.rounds, self.draw, self.step_number = folder, args.rounds, random.Random(1), 0
        self.train_state, self.batches = build(args)
        self.times: dict[str, list[float]] = {}

    def step(self) -> None:
        from megatron_ettin.train.progress import Progress
        from megatron_ettin.train.step import train_step

        self.train_state.progress = Progress(self.step_number)
        train_step(self.train_state, self.batches, 1e-5)
        self.step_number += 1

    def plain_steps(self, count: int) -> float:
        self.step()
        self.times["a step"] = [timed(self.step) for _ in range(count)]
        return statistics.median(self.times["a step"])

    def save(self, way: str, steps_after: int) -> tuple[float, float]:
        """Measure how long a save blocks training, and how long the steps after it take."""
        from megatron_ettin.train.progress import Progress
        from megatron_ettin.train.saving import Saver, SaveRequest

        settings = {"checkpoint.asynchronous": way == "asynchronous", "checkpoint.keep": 1}
        self.train_state.config = self.train_state.config.with_keys(settings)
        saver = Saver(self.train_state, self.folder, None)
        wait = timed(lambda: saver.begin(SaveRequest(Progress(step=self.step_number))))
        after = sum(timed(self.step) for _ in range(steps_after))
        outcome = saver.wait()
        assert outcome is not None and outcome.path is not None, outcome
        return wait, after

    def saves(self, plain: float) -> None:
        for _ in range(self.rounds):
            for way in self.draw.sample(["asynchronous", "synchronous"], 2):
                wait, after = self.save(way, AFTER)
                self.times.setdefault(f"{way}: wait", []).append(wait)
                self.times.setdefault(f"{way}: {AFTER} steps after", []).append(after - AFTER * plain)

    def loads(self, checkpoint: Path) -> None:
        from megatron_ettin.checkpoint import integrity
        from megatron_ettin.train import resume

        def load(way: str) -> None:
            resume.load(self.train_state, checkpoint, verified="verify" not in way)

        for _ in range(self.rounds):
            verified = timed(lambda: integrity.verify(checkpoint))
            self.times.setdefault("verify (sha256 of all files)", []).append(verified)
            for way in self.draw.sample(LOADS, len(LOADS)):
                if "disk" in way:
                    forget(checkpoint)
                self.times.setdefault(way, []).append(timed(lambda w=way: load(w)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return medians in seconds, and `bytes` of a checkpoint."""
    import torch

    from megatron_ettin.checkpoint import directory

    torch.set_num_threads(args.threads)
    bench = Bench(args, folder)
    if args.only == "loads":
        bench.plain_steps(1)
        bench.save("synchronous", 0)
    else:
        bench.saves(bench.plain_steps(2 * AFTER))
    newest = directory.latest(folder)
    assert newest is not None
    bench.loads(newest)
    figures = {name: statistics.median(values) for name, values in bench.times.items()}
    return figures | {"bytes": float(directory.total_bytes(newest))}


def table(args: argparse.Namespace, figures: dict[str, float]) -> str:
    size, plain = figures.pop("bytes"), figures["a step"]
    layers = f" --layers {args.layers}" if args.layers else ""
    only = f" --only {args.only}" if args.only else ""
    lines = [
        f"`python tools/bench_checkpoint.py --size {args.size}{layers} --rounds {args.rounds}{only}`",
        "",
        f"{time.strftime('%Y-%m-%d')}; {args.threads} threads of {platform.machine()}; {args.size}"
        f"{f' with {args.layers} layers' if args.layers else ''}, fp32, {args.rows} row of 1024 tokens a step;"
        f" a checkpoint has {size / 1e9:.2f} GB.",
        *("", "| | seconds | steps |", "|---|---|---|"),
        *(f"| {name} | {seconds:.3f} | {seconds / plain:.2f} |" for name, seconds in figures.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="150m")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["loads"], help="one save, then loads")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        text = table(args, measure(args, folder))
    finally:
        shutil.rmtree(folder)
    print(text, end="")
    if args.out is not None:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
