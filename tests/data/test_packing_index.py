"""Packing indices: every chunk exactly once, rows full, rebuilt when stale, one builder among many processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import DIGEST, with_digest
from megatron_ettin.data import packing
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.indexed import HEADER
from megatron_ettin.data.packing import pack
from megatron_ettin.data.packing_index import PackingIndex, existing_packing_indices
from megatron_ettin.data.verify import unlisted_files, verify_files
from tests.data.corpora import files_of
from tests.data.together import at_once


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=300), extra=st.integers(0, 30), window=st.integers(3, 80)
)
def test_pack_any_lengths_keep_every_chunk_once_within_row(lengths: list[int], extra: int, window: int) -> None:
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


def chunks_of(index: PackingIndex, row: int) -> np.ndarray:
    return index.chunks_of_rows(np.array([row]))[0]


def test_packing_index_covers_dataset_with_full_rows(prepared: Dataset) -> None:
    plan = PackingIndex.build_or_open(prepared, 256)
    assert plan.fill > 0.98
    assert plan.num_tokens == prepared.num_tokens
    chunks = np.concatenate([chunks_of(plan, row) for row in range(plan.num_rows)])
    assert sorted(chunks.tolist()) == list(range(prepared.num_chunks))
    tokens = [sum(len(prepared.chunk(int(chunk))) for chunk in chunks_of(plan, row)) for row in range(plan.num_rows)]
    assert plan.tokens_of(np.arange(plan.num_rows)).tolist() == tokens
    assert max(tokens) <= 256
    assert verify_files(list(unlisted_files(prepared.path))).problems == []
    assert [(p.batching, p.seq_len) for p in existing_packing_indices(prepared)].count(("packed", 256)) == 1


def test_packing_index_padded_holds_one_chunk_per_row(prepared: Dataset) -> None:
    plan = PackingIndex.build_or_open(prepared, 100, "padded")
    assert plan.num_rows == prepared.num_chunks
    assert chunks_of(plan, 5).tolist() == [5]
    assert plan.tokens_of([0, 5]).tolist() == [min(100, len(prepared.chunk(i))) for i in (0, 5)]
    assert plan.num_tokens == int(np.minimum(prepared.lengths_of(np.arange(prepared.num_chunks)), 100).sum())
    assert [f.name for f in plan.folder.iterdir()] == ["plan.json"]


def test_packing_index_short_rows_or_unknown_batching_are_refused(prepared: Dataset) -> None:
    with pytest.raises(UserError, match=r"chunk_tokens = 128\).*data\.seq_len = 100"):
        PackingIndex.build_or_open(prepared, 100)
    with pytest.raises(UserError, match=r"data\.batching: 'pack'; allowed: packed, padded"):
        PackingIndex.build_or_open(prepared, 256, "pack")


def test_packing_index_damaged_is_rebuilt_or_reported_by_verify(prepared: Dataset, tmp_path: Path) -> None:
    dataset = open_dataset(shutil.copytree(prepared.path, tmp_path / "copy"))
    first = PackingIndex.build_or_open(dataset, 512)
    chunks = first.folder / "chunks.int64"
    expected = chunks.read_bytes()
    chunks.write_bytes(expected[:-8])
    assert PackingIndex.build_or_open(dataset, 512).fingerprint == first.fingerprint
    assert chunks.read_bytes() == expected
    record = json.loads((first.folder / "plan.json").read_text())
    record.pop(DIGEST)
    stale = with_digest({**record, "dataset_fingerprint": "another"})
    (first.folder / "plan.json").write_text(json.dumps(stale))
    assert PackingIndex.build_or_open(dataset, 512).fingerprint == first.fingerprint
    assert json.loads((first.folder / "plan.json").read_text())["dataset_fingerprint"] == dataset.fingerprint
    chunks.write_bytes(expected[::-1])
    assert PackingIndex.build_or_open(dataset, 512).fingerprint == first.fingerprint
    problems = verify_files(list(unlisted_files(dataset.path))).problems
    assert [problem.startswith(f"{chunks}: damaged") for problem in problems] == [True]
    assert not list(dataset.path.glob(".tmp-*"))


def test_packing_index_concurrent_processes_build_it_once(prepared: Dataset, tmp_path: Path) -> None:
    shutil.copytree(prepared.path, tmp_path / "copy", ignore=shutil.ignore_patterns("rows_*"))
    outputs = at_once("tests.data.together:build_rows", tmp_path / "copy")
    assert sorted(line for text in outputs for line in text.split()) == ["built", *["ready"] * 4]
    assert not list((tmp_path / "copy").glob(".tmp-*"))
    assert PackingIndex.open(tmp_path / "copy" / "rows_300", open_dataset(tmp_path / "copy"), 300, "packed") is not None


def make_lengths_dataset(folder: Path, lengths: np.ndarray, vocabulary: int = 50_368) -> Dataset:
    """Make a dataset of chunks of these lengths, one a document; the token file is sparse and empty."""
    import dataclasses

    import pyarrow
    import pyarrow.ipc

    from megatron_ettin.base.files import write_json
    from megatron_ettin.data.indexed import index_bytes
    from megatron_ettin.data.manifest import FileRecord, Manifest, ShardRecord, SourceRecord, TokenizerRecord

    folder.mkdir(parents=True)
    shards, half = [], len(lengths) // 2
    for number, part in enumerate((lengths[:half], lengths[half:])):
        prefix, tokens = folder / f"shard_{number:05d}", int(part.sum())
        with open(f"{prefix}.bin", "wb") as stream:
            stream.truncate(2 * tokens)
        Path(f"{prefix}.idx").write_bytes(index_bytes(part, np.arange(len(part) + 1), np.dtype("<u2")))
        np.save(f"{prefix}.starts.npy", np.zeros(len(part), np.int64))
        names = pyarrow.array(["fake/a"] * len(part)).dictionary_encode()
        ids = pyarrow.array([str(i) for i in range(len(part))], pyarrow.large_string())
        batch = pyarrow.record_batch({"source": names, "document_id": ids, "tokens": pyarrow.array(part, "int64")})
        with pyarrow.OSFile(f"{prefix}.documents.arrow", "wb") as sink, pyarrow.ipc.new_file(sink, batch.schema) as out:
            out.write_batch(batch)
        Path(f"{prefix}.checksums.json").write_text("{}\n")
        suffixes = (".bin", ".idx", ".documents.arrow", ".starts.npy", ".checksums.json")
        files = {suffix: FileRecord(Path(f"{prefix}{suffix}").stat().st_size, "0" * 64) for suffix in suffixes}
        shards.append(ShardRecord(prefix.name, len(part), len(part), tokens, files))
    count, tokens = len(lengths), int(lengths.sum())
    manifest = Manifest(
        tokenizer=TokenizerRecord("fake", "0" * 64, vocabulary, (0, 1, 2), 0, 1, 2, 3),
        dtype="uint16",
        chunk_tokens=int(lengths.max()),
        min_chunk_tokens=0,
        skip_tokens=0,
        end_token="every",
        add_prefix_space=True,
        holdout=0.0,
        documents=count,
        chunks=count,
        tokens=tokens,
        longest_chunk_tokens=int(lengths.max()),
        dropped_tokens=0,
        empty_documents=0,
        sources=[SourceRecord("fake", count, count, tokens)],
        shards=shards,
        tokenizer_files={},
        settings_sha256="0" * 64,
    ).with_fingerprint()
    write_json(folder / "manifest.json", dataclasses.asdict(manifest))
    return open_dataset(folder)


def cut(documents: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """Return the chunk lengths of documents of these token counts, by the recipe's rule without its back-fill."""
    piece, skip = chunk_tokens - 2, 128 if chunk_tokens == 1_024 else 32
    lengths = []
    for tokens in documents.tolist():
        full, rest = divmod(tokens, piece)
        lengths += [chunk_tokens] * full + ([rest + 2] if rest >= skip or (rest and not full) else [])
    return np.array(lengths, np.int32)


@pytest.mark.parametrize("seq_len", [1_024, 8_192])
def test_packing_index_lognormal_lengths_fill_rows_to_99_percent(seq_len: int, tmp_path: Path) -> None:
    """50,000 documents of log-normal length, a median of 500 tokens."""
    documents = np.random.default_rng(0).lognormal(6.2, 1.1, 50_000).astype(int) + 1
    plan = PackingIndex.build_or_open(make_lengths_dataset(tmp_path / "dataset", cut(documents, seq_len)), seq_len)
    assert plan.fill >= 0.99


def test_packing_index_one_or_two_workers_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack several segments, none of which ends with a shard. The script makes segments small in the workers too."""
    monkeypatch.setattr(packing, "SEGMENT_CHUNKS", 7_000)
    lengths = np.random.default_rng(1).integers(3, 200, 30_000).astype(np.int32)
    dataset = make_lengths_dataset(tmp_path / "dataset", lengths)
    site = tmp_path / "site"
    site.mkdir()
    patch = "from megatron_ettin.data import packing\npacking.SEGMENT_CHUNKS = 7_000\n"
    script = (
        patch + "import sys\nfrom megatron_ettin.data.dataset import open_dataset\n"
        "from megatron_ettin.data.packing_index import PackingIndex\n"
        "if __name__ == '__main__':\n"
        "    print(PackingIndex.build_or_open(open_dataset(sys.argv[1]), 200, workers=int(sys.argv[2])).fingerprint)\n"
    )
    (site / "build.py").write_text(script)
    command = [sys.executable, str(site / "build.py"), str(dataset.path), "2"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    by_two = files_of(dataset.path / "rows_200")
    shutil.rmtree(dataset.path / "rows_200")
    plan = PackingIndex.build_or_open(dataset, 200, workers=1)
    assert done.stdout.strip() == plan.fingerprint
    assert files_of(dataset.path / "rows_200") == by_two
    chunks = np.concatenate([chunks_of(plan, row) for row in range(plan.num_rows)])
    assert sorted(chunks.tolist()) == list(range(30_000))
    rows_of = [set((chunks_of(plan, row) // 7_000).tolist()) for row in range(plan.num_rows)]
    assert max(len(segments) for segments in rows_of) == 1  # rows never combine chunks of two segments


def test_packing_index_pickles_small_and_reads_the_same(prepared: Dataset) -> None:
    for plan in (PackingIndex.build_or_open(prepared, 256), PackingIndex.build_or_open(prepared, 100, "padded")):
        raw = pickle.dumps(plan)
        assert len(raw) < 20_000
        again = pickle.loads(raw)
        assert again.fingerprint == plan.fingerprint
        assert chunks_of(again, 3).tolist() == chunks_of(plan, 3).tolist()
        assert again.tokens_of([0, 3]).tolist() == plan.tokens_of([0, 3]).tolist()


def test_packing_index_next_build_removes_leftovers_of_a_killed_one(prepared: Dataset, tmp_path: Path) -> None:
    dataset = open_dataset(shutil.copytree(prepared.path, tmp_path / "copy"))
    code = (
        "import sys, os; from megatron_ettin.data import packing_index; from megatron_ettin.data.dataset import open_dataset;"
        "packing_index.write_json = lambda *_: os.kill(os.getpid(), 9);"
        "packing_index.PackingIndex.build_or_open(open_dataset(sys.argv[1]), 777)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(dataset.path)]).returncode == -9
    assert len(list(dataset.path.glob(".tmp-rows_777-*"))) == 1
    PackingIndex.build_or_open(dataset, 778)
    assert not list(dataset.path.glob(".tmp-*"))


def test_packing_index_damaged_chunk_lengths_are_refused(tmp_path: Path) -> None:
    dataset = make_lengths_dataset(tmp_path / "dataset", np.full(10, 50, np.int32))
    with open(dataset.path / "shard_00001.idx", "r+b") as stream:
        stream.seek(HEADER.size)
        stream.write(np.int32(2_000_000_000).tobytes())
    with pytest.raises(UserError, match=r"a chunk of .*2000000000 tokens among chunks 0 to 9.*--verify"):
        PackingIndex.build_or_open(dataset, 64)
    assert not list(dataset.path.glob(".tmp-*"))
    assert not (dataset.path / "rows_64").exists()
