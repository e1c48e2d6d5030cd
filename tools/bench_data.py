"""Compare the data path with its peers: `ettin prepare` with Megatron-LM's preprocessing loop, our loader with
GPTDataset and mosaicml-streaming, and peak memory at two sizes of corpus. Writes docs/benchmarks/data.md.

The text is the docstrings of the installed packages (examples/docstrings.py). mosaicml-streaming needs an environment
of its own (it pins transformers < 5 and numpy < 2.2); without one its lines are left out.

    python tools/bench_data.py --streaming-python /path/to/its/bin/python
    python tools/bench_data.py --only prepare
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_loaders
import psutil

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks" / "data.md"
PEER = ROOT / "tools" / "peers" / "megatron_preprocess.py"
REPEATS = 3
WORKERS = (1, 2)
LEAST_BYTES = 10_000_000
# size of the larger corpus relative to the smaller, for memory
GROWTH = 10
SMALL_PLAN_CHUNKS = 4_000_000
BATCH_STEPS = 40


@dataclass
class Runs:
    """Repeated runs of one command."""

    seconds: list[float] = field(default_factory=list)
    # CPU seconds, workers included, which depend less on other load than wall time does
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SECTIONS], help="measure one section and leave the others as they are")
    parser.add_argument("--streaming-python", help="interpreter of an environment with mosaicml-streaming")
    parser.add_argument("--work", type=Path, help="where corpora are made (default: a temporary directory)")
    options = parser.parse_args()
    sections = read_sections(OUT)
    for name, measure in SECTIONS.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                sections[name] = [*conditions(name), "", *measure(Path(folder), options.streaming_python)]
            write_sections(OUT, sections)
            print("\n".join(sections[name]), flush=True)
    return 0


def conditions(name: str) -> list[str]:
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    busy = " Other work was running: the times are not those of an idle machine." if load > cpus / 2 else ""
    return [
        f"`python tools/bench_data.py --only {name}` on {time.strftime('%Y-%m-%d')}, {cpus} CPU cores "
        f"({platform.machine()}), Python {platform.python_version()}, load average {load:.1f} before.{busy}"
    ]


def read_sections(path: Path) -> dict[str, list[str]]:
    """Return the page's present sections."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("## "):
            current = sections.setdefault(line[3:], [])
        elif sections:
            current.append(line)
    return {name: "\n".join(lines).strip().splitlines() for name, lines in sections.items()}


def write_sections(path: Path, sections: dict[str, list[str]]) -> None:
    parts = [f"## {name}\n\n" + "\n".join(sections[name]) + "\n" for name in SECTIONS if name in sections]
    path.write_text("# The data path: speed and memory\n\n" + "\n".join(parts), encoding="utf-8")


def docstrings(folder: Path) -> Path:
    text = folder / "docstrings.jsonl"
    subprocess.run([sys.executable, ROOT / "examples" / "docstrings.py", "--out", text], check=True)
    if text.stat().st_size < LEAST_BYTES:
        raise SystemExit(f"{text.stat().st_size} bytes of text, wanted {LEAST_BYTES}: install more packages")
    return text


def measure_prepare(folder: Path, streaming_python: str | None) -> list[str]:
    """Time whole commands, start-up included; ours and the peer's take turns."""
    text = docstrings(folder)
    ours, theirs = {n: Runs() for n in WORKERS}, {n: Runs() for n in WORKERS}
    tokenizer = folder / "warm" / "tokenizer"
    # creates the tokenizer's cache and the peer's folder
    run(prepare_command(text, folder / "warm", 1, []))
    for _ in range(REPEATS):
        for workers in WORKERS:
            out = folder / "dataset"
            timed(prepare_command(text, out, workers, ["--seq-len", "1024"]), ours[workers])
            shutil.rmtree(out)
            timed(
                [sys.executable, str(PEER), str(text), str(tokenizer), str(folder / "peer"), str(workers)],
                theirs[workers],
            )
    lines = [
        f"Input: {text.stat().st_size / 1e6:.1f} MB of .jsonl. Each figure is the whole command, start-up included, "
        f"median of {REPEATS}; ours makes the packing index of 1,024, documents table and checksums too.",
        "",
        "| workers | `ettin prepare` | tokens/s | CPU | Megatron's loop | tokens/s | CPU | ratio of tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workers in WORKERS:
        a, b = ours[workers], theirs[workers]
        ratio = a.tokens_per_second / b.tokens_per_second
        lines.append(f"| {workers} | {cells(a)} | {cells(b)} | {ratio:.2f} |")
    return [*lines, "", *stages(text, tokenizer)]


def cells(runs: Runs) -> str:
    seconds, cpu = statistics.median(runs.seconds), statistics.median(runs.cpu_seconds)
    return f"{seconds:.1f} s | {runs.tokens_per_second:,.0f} | {cpu:.1f} s"


def prepare_command(text: Path, out: Path, workers: int, more: list[str]) -> list[str]:
    command = [sys.executable, "-m", "megatron_ettin", "prepare", str(text), "--out", str(out)]
    return [*command, "--workers", str(workers), "--json", *more]


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def timed(command: list[str], runs: Runs) -> None:
    began, cpu_began = time.perf_counter(), children_cpu_seconds()
    record = json.loads(run(command))
    runs.seconds.append(time.perf_counter() - began)
    runs.cpu_seconds.append(children_cpu_seconds() - cpu_began)
    runs.tokens = record["tokens"]


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stages(text: Path, tokenizer_folder: Path) -> list[str]:
    """Time the parts of a prepare task, each alone, in this process."""
    from megatron_ettin.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(tokenizer_folder)
    with open(text, encoding="utf-8") as stream:
        began = time.perf_counter()
        texts = [json.loads(line)["text"] for line in stream]
        reading = time.perf_counter() - began
    began = time.perf_counter()
    for first in range(0, len(texts), 1_024):
        tokenizer.encode_batch(texts[first : first + 1_024])
    encoding = time.perf_counter() - began
    return [
        f"Of one worker's time {encoding:.1f} s are the tokenizer's library (the floor for every pipeline on it) and "
        f"{reading:.1f} s reading JSON; the rest is start-up, chunking, writing, hashing and the packing index."
    ]


def peak_bytes(command: list[str]) -> int:
    """Return the peak memory of a command and its workers together (sum of unique set sizes, sampled)."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    most = 0
    while process.poll() is None:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().uss
            except psutil.Error:
                continue
        most = max(most, total)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    return most


def measure_memory(folder: Path, streaming_python: str | None) -> list[str]:
    """Measure the memory of `prepare` and packing at one size and at ten times that."""
    text = docstrings(folder)
    larger = folder / "larger.jsonl"
    with open(larger, "wb") as out:
        # each copy has other text, so that no document repeats
        for i in range(GROWTH):
            for line in open(text, encoding="utf-8"):  # noqa: SIM115
                out.write((json.dumps({"text": f"{i} " + json.loads(line)["text"]}) + "\n").encode())
    lines = ["| what | 1x | 10x | most memory at 1x | at 10x |", "|---|---|---|---|---|"]
    sizes = [f"{path.stat().st_size / 1e6:.0f} MB of text" for path in (text, larger)]
    for workers in WORKERS:
        peaks = [peak_bytes(prepare_command(path, folder / path.stem, workers, [])) for path in (text, larger)]
        for path in (text, larger):
            shutil.rmtree(folder / path.stem)
        lines.append(f"| prepare, {workers} worker{'s' * (workers > 1)} | {' | '.join(sizes)} | {megabytes(peaks)} |")
    chunks = (SMALL_PLAN_CHUNKS, GROWTH * SMALL_PLAN_CHUNKS)
    peaks = [
        peak_bytes([sys.executable, str(ROOT / "tools" / "plan_rows.py"), str(folder / f"{n}"), str(n)]) for n in chunks
    ]
    counts = " | ".join(f"{n:,} chunks" for n in chunks)
    return [*lines, f"| packing index of 1,024 | {counts} | {megabytes(peaks)} |"]


def megabytes(peaks: list[int]) -> str:
    return " | ".join(f"{peak / 1e6:.0f} MB" for peak in peaks)


def measure_loaders(folder: Path, streaming_python: str | None) -> list[str]:
    return [
        f'Rows of 1,024 tokens in training order, median of {bench_loaders.REPEATS} processes each. "First row after" '
        'counts from the interpreter\'s start of the script, imports included; ours imports no torch. "Most memory" '
        "counts mapped pages of the files as well, which the kernel takes back when it wants them: after 20,000 rows "
        "of a real file most of ours and of GPTDataset's are those.",
        "",
        *bench_loaders.run(folder, streaming_python),
    ]


def measure_batches(folder: Path, streaming_python: str | None) -> list[str]:
    """Measure what a micro-batch costs the training process while two workers make them ahead."""
    lines = ["| objective | micro-batch | in the training process |", "|---|---|---|"]
    for objective in ("mlm", "clm"):
        for rows, seq_len in ((16, 1_024), (2, 8_192)):
            low, middle, high = statistics.quantiles(seconds_per_batch(objective, rows, seq_len), n=4)
            figures = f"{1e3 * middle:.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f})"
            lines.append(f"| {objective} | {rows} rows of {seq_len:,} | {figures} |")
    return [
        "CPU seconds of the training process's main thread for a micro-batch that two workers have made, median and "
        "middle half. On a GPU the copies to the device come on top.",
        "",
        *lines,
    ]


def seconds_per_batch(objective: str, rows: int, seq_len: int) -> list[float]:
    """Return the main thread's CPU seconds per micro-batch, for each of some steps."""
    import torch

    from megatron_ettin.batching.batches import Batches
    from megatron_ettin.bench.synthetic import SyntheticRows
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.parallel.env import Topology
    from megatron_ettin.parallel.groups import Layout

    settings = f"data.seq_len={seq_len} batch.global_batch_rows={2 * rows} batch.micro_batch_rows={rows} data.workers=2"
    config = parse("150m", objective, "pretrain", overrides=[*settings.split(), "batch.warmup_tokens=0"])
    layout = Layout(Topology.of(config, 1), 0, 0, 0, 0, 0, None, None, None)
    dataset: Any = SyntheticRows(seq_len, 200.0, config.model.vocab_size)
    batches = Batches.of(config, dataset, layout, torch.device("cpu"))
    seconds = []
    with batches.prefetched(0, BATCH_STEPS):
        for step in range(BATCH_STEPS):
            # gives the workers time to make the next micro-batches, as a device's step would
            time.sleep(0.15)
            began = time.thread_time()
            count = len(list(batches.step(step)))
            seconds.append((time.thread_time() - began) / count)
    return seconds[BATCH_STEPS // 5 :]


SECTIONS: dict[str, Callable[[Path, str | None], list[str]]] = {
    "prepare": measure_prepare,
    "memory": measure_memory,
    "loaders": measure_loaders,
    "batches": measure_batches,
}

if __name__ == "__main__":
    sys.exit(main())
