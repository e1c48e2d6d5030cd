"""Compare start-up, memory and rows per second of our loader, megatron-core's GPTDataset and mosaicml-streaming.

Part of tools/bench_data.py. Each runs in a process of its own on the same rows of 1,024 tokens.

10**6 rows are real random tokens. Beyond that the corpus is sparse (tools/fake_corpora.py): an index of the full size,
tokens only in the first rows, which are all that a start-up reads. GPTDataset reads every document's length to build
its indices, so it gets an index without holes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from fake_corpora import DTYPE, fill_positions, make_sparse_dataset

from megatron_ettin.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION

PEERS = Path(__file__).resolve().parent / "peers"
ROW_TOKENS = 1_024
REAL_ROWS = 10**6
PAPER_ROWS = (10**8, 10**9, 10**10)
# the peers' memory limits the comparison
LARGEST_PEER_ROWS = 10**8
READ_ROWS = 20_000
# rows with content in a sparse dataset: a micro-batch and more
FIRST_ROWS = 32
REPEATS = 3
# datasets in the largest mixture
MIXED = 4

Figure = dict[str, float]


def measure(python: str, name: str, folder: Path, rows: int, read: int) -> Figure | str:
    """Return the medians of REPEATS processes, or the last line of an error."""
    runs: list[Figure] = []
    command = [python, str(PEERS / "rows.py"), name, str(folder), str(rows), str(read)]
    for _ in range(REPEATS):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def fill_with_tokens(folder: Path, rows: int) -> None:
    """Write random tokens to every row of a sparse dataset, and its full index."""
    draw = np.random.default_rng(0)
    with open(folder / "shard_00000.bin", "r+b") as stream:
        for _ in range(0, rows, 50_000):
            stream.write(draw.integers(5, 50_000, (50_000, ROW_TOKENS), dtype=np.uint16).astype(DTYPE).tobytes())


def write_whole_index(path: Path, rows: int) -> None:
    """Write an .idx in which every row is a document of its own."""
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[DTYPE], rows, rows + 1))
        np.full(rows, ROW_TOKENS, "<i4").tofile(stream)
        (np.arange(rows, dtype="<i8") * ROW_TOKENS * DTYPE.itemsize).tofile(stream)
        np.arange(rows + 1, dtype="<i8").tofile(stream)


def gpt_folder(ettin: Path, folder: Path, rows: int) -> Path:
    folder.mkdir()
    os.link(ettin / "shard_00000.bin", folder / "shard_00000.bin")
    write_whole_index(folder / "shard_00000.idx", rows)
    return folder


def streaming_folder(python: str, ettin: Path, folder: Path, rows: int) -> Path:
    """Return 10**6 rows written by mosaicml-streaming; for more rows, its shards again under other names."""
    tokens = ettin / "shard_00000.bin"
    subprocess.run([python, str(PEERS / "write_mds.py"), str(tokens), str(folder), str(REAL_ROWS)], check=True)
    return folder


def repeat_shards(written: Path, folder: Path, rows: int) -> Path:
    """Make a streaming dataset of `rows` rows whose shards are links to the few that exist."""
    folder.mkdir()
    shard = json.loads((written / "index.json").read_text())["shards"][0]
    name = shard["raw_data"]["basename"]
    shards = []
    for i in range(rows // shard["samples"]):
        copy = f"shard.{i:06d}.mds"
        os.symlink(written / name, folder / copy)
        shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": copy}})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


def run(work: Path, streaming_python: str | None) -> list[str]:
    """Return the lines of the section."""
    lines: list[tuple[int, str, Figure | str]] = []
    ettin = work / "real"
    make_sparse_dataset(ettin, REAL_ROWS, ROW_TOKENS)
    fill_with_tokens(ettin, REAL_ROWS)
    fill_positions([ettin], ROW_TOKENS, range(READ_ROWS + FIRST_ROWS))
    lines.append((REAL_ROWS, "ettin", measure(sys.executable, "ettin", ettin, REAL_ROWS, READ_ROWS)))
    gpt = gpt_folder(ettin, work / "gpt", REAL_ROWS)
    lines.append((REAL_ROWS, "GPTDataset", measure(sys.executable, "gpt", gpt, REAL_ROWS, READ_ROWS)))
    written = None
    if streaming_python:
        written = streaming_folder(streaming_python, ettin, work / "mds", REAL_ROWS)
        figure = measure(streaming_python, "streaming", written, REAL_ROWS, READ_ROWS)
        lines.append((REAL_ROWS, "mosaicml-streaming", figure))
    shutil.rmtree(gpt)
    for rows in PAPER_ROWS:
        lines += paper_rows(work / f"paper{rows}", rows, streaming_python, written)
        print(*lines[-1], flush=True)
    return table(lines)


def paper_rows(
    work: Path, rows: int, streaming_python: str | None, written: Path | None
) -> list[tuple[int, str, Figure | str]]:
    work.mkdir()
    parts = [work / f"part{i}" for i in range(MIXED if rows == PAPER_ROWS[-1] else 1)]
    for part in parts:
        make_sparse_dataset(part, rows // len(parts), ROW_TOKENS)
    fill_positions(parts, ROW_TOKENS, range(FIRST_ROWS))
    name = "ettin" if len(parts) == 1 else f"ettin, a mixture of {len(parts)}"
    lines: list[tuple[int, str, Figure | str]] = [(rows, name, measure(sys.executable, "ettin", work, rows, 1))]
    if rows <= LARGEST_PEER_ROWS:
        gpt = gpt_folder(parts[0], work / "gpt", rows)
        lines.append((rows, "GPTDataset", measure(sys.executable, "gpt", gpt, rows, 1)))
        if streaming_python and written is not None:
            folder = repeat_shards(written, work / "mds", rows)
            lines.append((rows, "mosaicml-streaming", measure(streaming_python, "streaming", folder, rows, 1)))
    shutil.rmtree(work)
    return lines


def table(lines: list[tuple[int, str, Figure | str]]) -> list[str]:
    out = ["| rows | loader | first row after | most memory | rows/s in training order |", "|---|---|---|---|---|"]
    for rows, name, figure in lines:
        if isinstance(figure, str):
            out.append(f"| {rows:,} | {name} | failed: {figure} | | |")
            continue
        speed = f"{figure['rows_per_second']:,.0f}" if figure["rows_per_second"] else ""
        memory = f"{figure['peak_rss_bytes'] / 1e6:,.0f} MB"
        out.append(f"| {rows:,} | {name} | {figure['first_row_seconds']:.2f} s | {memory} | {speed} |")
    return out
