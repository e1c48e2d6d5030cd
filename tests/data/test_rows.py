"""Row plans: every chunk exactly once, rows full, rebuilt when stale, one builder among many processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.config.errors import UserError
from megatron_ettin.data import packing
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.packing import pack
from megatron_ettin.data.rows import ensure_row_plan, existing_plans


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=300), extra=st.integers(0, 30), window=st.integers(3, 80)
)
def test_packing_keeps_every_chunk_once(lengths: list[int], extra: int, window: int) -> None:
    row_tokens = 40 + extra
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_CHUNKS", window)
        patch.setattr(packing, "CARRIED_CHUNKS", window // 3)
        packed = list(pack(np.array(lengths, np.int32), row_tokens))
    chunks = np.concatenate([chunks for chunks, _ in packed])
    counts = np.concatenate([counts for _, counts in packed])
    assert sorted(chunks.tolist()) == list(range(len(lengths)))
    assert counts.min() >= 1
    rows = np.add.reduceat(np.array(lengths)[chunks], np.cumsum(counts) - counts)
    assert rows.max() <= row_tokens


def test_ordinary_text_fills_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = []
    for tokens in rng.lognormal(6.2, 1.1, 30_000).astype(int) + 1:  # a median document of 500 tokens
        full, rest = divmod(int(tokens), 1_022)
        lengths += [1_024] * full + ([rest + 2] if rest >= 128 or not full else [])
    packed = list(pack(np.array(lengths, np.int32), 1_024))
    assert sum(lengths) / (1_024 * sum(len(counts) for _, counts in packed)) > 0.98


def test_plan_of_a_dataset(prepared: Dataset) -> None:
    plan = ensure_row_plan(prepared, 256)
    assert plan.fill > 0.98
    assert plan.num_tokens == prepared.num_tokens
    chunks = np.concatenate([plan.chunks_of(row) for row in range(plan.num_rows)])
    assert sorted(chunks.tolist()) == list(range(prepared.num_chunks))
    tokens = [sum(len(prepared.chunk(int(chunk))) for chunk in plan.chunks_of(row)) for row in range(plan.num_rows)]
    assert plan.tokens_of(np.arange(plan.num_rows)).tolist() == tokens
    assert max(tokens) <= 256
    plan.verify()
    assert [(p.batching, p.seq_len) for p in existing_plans(prepared)].count(("packed", 256)) == 1


def test_padded_plan_is_one_chunk_a_row(prepared: Dataset) -> None:
    plan = ensure_row_plan(prepared, 100, "padded")
    assert plan.num_rows == prepared.num_chunks
    assert plan.chunks_of(5).tolist() == [5]
    assert plan.tokens_of([0, 5]).tolist() == [min(100, len(prepared.chunk(i))) for i in (0, 5)]
    assert plan.num_tokens == int(np.minimum(prepared.chunk_lengths, 100).sum())
    assert [f.name for f in plan.folder.iterdir()] == ["plan.json"]


def test_short_rows_are_refused(prepared: Dataset) -> None:
    with pytest.raises(UserError, match=r"chunk_tokens = 128\).*data\.seq_len = 100"):
        ensure_row_plan(prepared, 100)
    with pytest.raises(UserError, match=r"data\.batching: 'pack'; allowed: packed, padded"):
        ensure_row_plan(prepared, 256, "pack")


def test_stale_and_damaged_plans_are_rebuilt(prepared: Dataset, tmp_path: Path) -> None:
    dataset = open_dataset(shutil.copytree(prepared.path, tmp_path / "copy"))
    first = ensure_row_plan(dataset, 512)
    chunks = first.folder / "chunks.int64"
    expected = chunks.read_bytes()
    chunks.write_bytes(expected[:-8])
    assert ensure_row_plan(dataset, 512).fingerprint == first.fingerprint
    assert chunks.read_bytes() == expected
    record = json.loads((first.folder / "plan.json").read_text())
    (first.folder / "plan.json").write_text(json.dumps({**record, "dataset_fingerprint": "another"}))
    assert ensure_row_plan(dataset, 512).fingerprint == first.fingerprint
    chunks.write_bytes(expected[::-1])
    with pytest.raises(UserError, match=r"chunks\.int64: damaged"):
        ensure_row_plan(dataset, 512).verify()
    assert not list(dataset.path.glob(".tmp-*"))


def test_processes_at_once_share_one_plan(prepared: Dataset, tmp_path: Path) -> None:
    shutil.copytree(prepared.path, tmp_path / "copy", ignore=shutil.ignore_patterns("rows_*"))
    code = (
        "import sys; from megatron_ettin.data.dataset import open_dataset;"
        "from megatron_ettin.data.rows import ensure_row_plan;"
        "print(ensure_row_plan(open_dataset(sys.argv[1]), 300).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "copy")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {process.communicate(timeout=60)[0] for process in running}
    assert len(printed) == 1 and all(process.returncode == 0 for process in running)
    assert not list((tmp_path / "copy").glob(".tmp-*"))
