"""Pack the rows of a sparse dataset (tools/fake_corpora.py) with log-normal chunk lengths. tools/bench_data.py measures
the memory of this process.

    python tools/plan_rows.py FOLDER CHUNKS
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from fake_corpora import make_sparse_dataset

from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.indexed import HEADER
from megatron_ettin.data.packing_index import PackingIndex

ROW_TOKENS = 1_024
AT_ONCE = 1_000_000


def main(folder: Path, chunks: int) -> None:
    make_sparse_dataset(folder, chunks, ROW_TOKENS)
    shutil.rmtree(folder / f"rows_{ROW_TOKENS}")
    draw = np.random.default_rng(0)
    with open(folder / "shard_00000.idx", "r+b") as stream:
        stream.seek(HEADER.size)
        for _ in range(0, chunks, AT_ONCE):
            lengths = np.clip(draw.lognormal(6.0, 0.8, AT_ONCE), 3, ROW_TOKENS)
            stream.write(lengths.astype("<i4").tobytes())
    plan = PackingIndex.build_or_open(open_dataset(folder), ROW_TOKENS)
    print(f"{plan.num_rows} rows, {plan.fill:.4f} full")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
