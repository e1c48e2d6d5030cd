"""Compare `ettin convert` in both directions with `transformers` loading and saving the same weights, and time
`ettin release` of many checkpoints: seconds and peak memory of whole commands.

  python tools/bench_convert.py [--sizes 150m 1b] [--repeats 3] [--checkpoints 50] [--room DIR] [--out PAGE.md]

Each command is a process of its own, and they take turns; figures are medians. Every command ends with its output on
the disk: ours force it there themselves, the tool does it after `save_pretrained`. Memory is the largest resident set
(ru_maxrss), with pages of mapped files included on both sides. Weights are seeded random numbers in float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ettin.config.tables import SIZES

VOCABULARY = 50_368
MAKE = """
import sys, torch, transformers
hidden, ffn, layers, heads, vocabulary = map(int, sys.argv[2:])
torch.manual_seed(0)
config = transformers.ModernBertConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
    num_attention_heads=heads, vocab_size=vocabulary)
transformers.ModernBertForMaskedLM(config).save_pretrained(sys.argv[1])
"""
LOAD_SAVE = """
import os, sys, transformers
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
os.sync()
"""


@dataclass
class CommandTimes:
    """Figures of one command over its repeats."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_bytes(self) -> float:
        return statistics.median(self.peak_bytes)


def run(times: CommandTimes, command: list[str], out: Path) -> None:
    """Time one process, after its output `out` is removed."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:6])}: {errors.decode()[-2000:]}")
    times.seconds.append(time.perf_counter() - began)
    times.peak_bytes.append(usage.ru_maxrss * 1024)


def conversions(size: str, repeats: int, room: Path) -> list[str]:
    """Return the table rows of one size."""
    shape = SIZES[size]
    theirs, checkpoint = room / "theirs", room / "checkpoint"
    shape_arguments = [
        shape.hidden_size,
        shape.ffn_hidden_size,
        shape.num_layers,
        shape.num_attention_heads,
        VOCABULARY,
    ]
    subprocess.run(
        [sys.executable, "-c", MAKE, str(theirs), *map(str, shape_arguments)], check=True, capture_output=True
    )
    ettin = [sys.executable, "-m", "megatron_ettin", "convert"]
    subprocess.run([*ettin, "from-hf", str(theirs), str(checkpoint)], check=True, capture_output=True)
    out = room / "out"
    commands = {
        "transformers load + save": [sys.executable, "-c", LOAD_SAVE, str(theirs), str(out)],
        "`to-hf --no-verify`": [*ettin, "to-hf", str(checkpoint), str(out), "--no-verify"],
        "`from-hf`": [*ettin, "from-hf", str(theirs), str(out)],
        "`to-hf` with verification": [*ettin, "to-hf", str(checkpoint), str(out)],
    }
    timings = {name: CommandTimes() for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            # the first turn warms the page cache and is not counted
            run(timings[name] if number else CommandTimes(), command, out)
            print(f"{size} {name}: {number}/{repeats}", file=sys.stderr, flush=True)
    base = timings["transformers load + save"]
    megabytes = sum(path.stat().st_size for path in theirs.glob("*.safetensors")) / 1e6
    shutil.rmtree(room)
    return [
        f"| {size} ({megabytes:,.0f} MB) | {name} | {one.median_seconds:.1f} ({min(one.seconds):.1f} to"
        f" {max(one.seconds):.1f}) | {one.median_seconds / base.median_seconds:.2f} |"
        f" {one.median_bytes / 1e6:,.0f} | {one.median_bytes / base.median_bytes:.2f} |"
        for name, one in timings.items()
    ]


def releases(checkpoints: int, room: Path) -> list[str]:
    """Time the release of a run of the 17m shape with `checkpoints` checkpoints: one worker, two, and repeated."""
    shape = SIZES["17m"]
    arguments = [shape.hidden_size, shape.ffn_hidden_size, shape.num_layers, shape.num_attention_heads, VOCABULARY]
    subprocess.run(
        [sys.executable, "-c", MAKE, str(room / "theirs"), *map(str, arguments)], check=True, capture_output=True
    )
    ettin = [sys.executable, "-m", "megatron_ettin"]
    folder = room / "run" / "checkpoints"
    folder.mkdir(parents=True)
    first = folder / "step_000000001"
    subprocess.run([*ettin, "convert", "from-hf", str(room / "theirs"), str(first)], check=True, capture_output=True)
    for step in range(2, checkpoints + 1):
        shutil.copytree(first, folder / f"step_{step:09d}", copy_function=os.link)
    config = (first / "config.yaml").read_text().replace("phase: imported", "phase: pretrain")
    (room / "run" / "config.yaml").write_text(config)
    lines = []
    for name, workers, fresh in (("one worker", 1, True), ("two workers", 2, True), ("again, nothing to do", 2, False)):
        times, out = CommandTimes(), room / "out"
        if not fresh:
            os.rename(out, room / "kept")
        arguments = ["release", str(room / "run"), "--out", str(out if fresh else room / "kept"), "--order", "none"]
        run(times, [*ettin, *arguments, "--workers", str(workers), "--json"], out)
        seconds = times.median_seconds
        lines.append(f"| {name} | {seconds:.0f} | {seconds / (checkpoints + 1):.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    shutil.rmtree(room)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=["150m", "1b"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=50, help="of the 17m shape to release; 0 leaves it out")
    parser.add_argument("--room", type=Path, help="where to write (a temporary folder)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.room) as folder:
        rows = [row for size in args.sizes for row in conversions(size, args.repeats, _room(folder, size))]
        released = releases(args.checkpoints, _room(folder, "release")) if args.checkpoints else []
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    command = f"python tools/bench_convert.py --sizes {' '.join(args.sizes)} --repeats {args.repeats}"
    heading = f"`{command} --checkpoints {args.checkpoints}`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, "
    lines = [
        "# Conversion and release",
        "",
        heading + ", ".join(f"{name} {v}" for name, v in versions.items()) + ".",
        "",
    ]
    if rows:
        lines += [
            "| weights, float32 | command | seconds, median (range) | ratio | peak MB | ratio |",
            "|---|---|---|---|---|---|",
        ]
        lines += rows
    if released:
        head = f"release of {args.checkpoints} checkpoints of 17m and step 0, each verified"
        lines += ["", f"| {head} | seconds | a checkpoint |", "|---|---|---|", *released]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


def _room(folder: str, name: str) -> Path:
    room = Path(folder) / name
    room.mkdir()
    return room


if __name__ == "__main__":
    main()
