"""Measure one loader in a process of its own: seconds from its first import to its first row, rows per second in
training order after that, and peak memory. Prints one JSON object.

    python tools/peers/rows.py ettin|gpt|streaming FOLDER ROWS READ
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROW_TOKENS = 1_024
MICRO_BATCH_ROWS = 16
BEGAN = time.perf_counter()


def ettin_rows(folder: Path, rows: int) -> Iterator[Any]:
    from megatron_ettin.data.blended_dataset import open_blended_dataset
    from megatron_ettin.data.mixture import MixtureEntry

    parts = sorted(folder.glob("part*")) or [folder]
    corpus = open_blended_dataset(
        [MixtureEntry(str(p), weight=1.0) for p in parts], ROW_TOKENS, "packed", 21, "pretrain"
    )
    # as the training loader requests them
    for first in range(0, rows, MICRO_BATCH_ROWS):
        for row in corpus.rows(range(first, min(first + MICRO_BATCH_ROWS, rows))):
            yield row.tokens


def gpt_rows(folder: Path, rows: int) -> Iterator[Any]:
    from types import SimpleNamespace

    import numpy
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=50_282, pad=50_283, vocab_size=50_368, unique_identifiers={"class": "bench"})
    config = GPTDatasetConfig(
        random_seed=21,
        sequence_length=ROW_TOKENS,
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
        tokenizer=tokenizer,  # type: ignore[arg-type]
    )
    prefix = str(folder / "shard_00000")
    indexed = IndexedDataset(prefix)
    documents = numpy.arange(len(indexed.document_indices) - 1, dtype=numpy.int32)
    dataset = GPTDataset(indexed, prefix, documents, rows, Split.train, config)
    for i in range(rows):
        yield dataset[i]["tokens"]


def streaming_rows(folder: Path, rows: int) -> Iterator[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=21, batch_size=1, num_canonical_nodes=1)
    for sample in dataset:
        yield sample["input_ids"]


LOADERS: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "ettin": ettin_rows,
    "gpt": gpt_rows,
    "streaming": streaming_rows,
}


def main(name: str, folder: Path, rows: int, read: int) -> dict[str, float]:
    loader = LOADERS[name](folder, rows)
    first = len(next(loader))
    assert first == ROW_TOKENS, first
    started = time.perf_counter()
    total = sum(int(row[0] >= 0) for row, _ in zip(loader, range(read - 1), strict=False)) if read > 1 else 0
    seconds = time.perf_counter() - started
    # not getrusage, which counts the parent's memory at the fork
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    return {
        "first_row_seconds": started - BEGAN,
        "rows_per_second": total / seconds if total else 0.0,
        "peak_rss_bytes": float(peak),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))), flush=True)
    # streaming's threads and shared memory would delay the exit
    os._exit(0)
