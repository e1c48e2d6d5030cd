"""The dataset on disk: read by Megatron-Core, traced to its documents, and refused by name when damaged."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.indexed import index_bytes, open_shard, token_dtype
from megatron_ettin.data.tokenizer import Tokenizer
from tests.data.others import called


@pytest.mark.parametrize("mmap", [True, False])
def test_shards_opened_by_megatron_core_hold_the_same_chunks(prepared: Dataset, mmap: bool) -> None:
    first = 0
    for shard in prepared.manifest.shards:
        theirs = called("read_by_core", prepared.path / shard.name, mmap)
        assert (len(theirs["chunks"]), theirs["documents"]) == (shard.chunks, shard.documents)
        for i, chunk in enumerate(theirs["chunks"]):
            assert chunk == prepared.chunk(first + i).tolist()
        first += len(theirs["chunks"])
    assert first == prepared.num_chunks


def test_shard_of_wide_vocabulary_is_int32_and_readable(tmp_path: Path) -> None:
    assert (token_dtype(65_536), token_dtype(65_537)) == (np.uint16, np.int32)
    tokens = np.array([70_000, 1, 128_000], dtype=token_dtype(128_001))
    (tmp_path / "shard.bin").write_bytes(tokens.tobytes())
    (tmp_path / "shard.idx").write_bytes(index_bytes(np.array([2, 1]), np.array([0, 1, 2]), tokens.dtype))
    ours = open_shard(tmp_path / "shard")
    assert [ours.chunk(i).tolist() for i in range(2)] == [[70_000, 1], [128_000]]
    assert called("read_by_core", tmp_path / "shard", True)["chunks"] == [[70_000, 1], [128_000]]


def test_document_of_every_chunk_names_source_and_matches_its_text(prepared: Dataset, tokenizer: Tokenizer) -> None:
    lines = [json.loads(line) for line in (prepared.path.parent / "corpus.jsonl").read_text().splitlines()]
    texts = {line.get("id", f"corpus.jsonl:{i + 1}"): line["text"] for i, line in enumerate(lines)}
    heldout = open_dataset(prepared.path / "heldout")
    seen: dict[str, int] = {}
    for dataset in (prepared, heldout):
        documents = []
        for i in range(dataset.num_chunks):
            source, document, start, number = dataset.document_of(i)
            inner = dataset.chunk(i)[1:-1]
            expected = tokenizer.encode_batch([texts[document]])[0][start : start + len(inner)]
            assert source == "corpus.jsonl"
            assert inner.tolist() == expected
            documents.append(number)
            seen[document] = max(seen.get(document, 0), start + len(inner))
        assert documents == sorted(documents)
        assert len(set(documents)) == dataset.num_documents
    assert set(seen) == set(texts)  # no document is both in the dataset and held out
    dropped = sum(len(tokenizer.encode_batch([texts[d]])[0]) - end for d, end in seen.items())
    assert dropped == prepared.manifest.dropped_tokens + heldout.manifest.dropped_tokens
    assert 0.04 < heldout.num_documents / len(texts) < 0.2


def test_dataset_pickled_reads_the_same_chunks(prepared: Dataset) -> None:
    prepared.chunk(0)
    again = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(again.chunk(3), prepared.chunk(3))
    assert again.lengths_of([0, 3]).tolist() == [len(prepared.chunk(0)), len(prepared.chunk(3))]


def test_open_dataset_truncated_or_missing_file_is_named(prepared: Dataset, tmp_path: Path) -> None:
    shutil.copytree(prepared.path, tmp_path / "copy")
    for suffix in (".bin", ".idx", ".documents.arrow", ".starts.npy", ".checksums.json"):
        damaged = tmp_path / "copy" / f"shard_00000{suffix}"
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-3])
        with pytest.raises(UserError, match=rf"shard_00000{suffix}: truncated, \d+ bytes, the manifest says"):
            open_dataset(tmp_path / "copy")
        damaged.unlink()
        with pytest.raises(UserError, match=rf"shard_00000{suffix}: missing"):
            open_dataset(tmp_path / "copy")
        damaged.write_bytes(whole)


def test_verify_flipped_bit_names_the_damaged_shard(prepared: Dataset, tmp_path: Path) -> None:
    copy = open_dataset(shutil.copytree(prepared.path, tmp_path / "copy"))
    copy.verify()
    file = copy.path / "shard_00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00000\.bin: damaged"):
        copy.verify()


def test_open_dataset_absent_or_damaged_manifest_is_refused(prepared: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(UserError, match=r"not a dataset: no manifest\.json"):
        open_dataset(tmp_path)
    good = json.loads((prepared.path / "manifest.json").read_text())
    lacking = json.loads((prepared.path / "manifest.json").read_text())
    del lacking["content_sha256"], lacking["shards"][0]["files"][".bin"]
    for content, message in (
        ("{", "damaged manifest"),
        (json.dumps({**good, "version": 99}), "version 99; this package reads"),
        (json.dumps({**good, "surprise": 1}), "damaged manifest"),
        (json.dumps(lacking), r"damaged manifest .*shard_00000 has no \.bin"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path)


def test_inspect_reports_manifest_counts_and_samples(prepared: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(prepared.path), "--json", "--sample", "2", "--verify"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["chunks"], report["tokens"]) == (
        prepared.num_documents,
        prepared.num_chunks,
        prepared.num_tokens,
    )
    assert report["verified"]
    assert len(report["samples"]) == 2
    assert all(sample["text"].startswith("[CLS]") and sample["text"].endswith("[SEP]") for sample in report["samples"])
    assert main(["inspect", str(prepared.path)]) == 0
    plain = capsys.readouterr().out
    assert f"{prepared.num_tokens:,} tokens" in plain
    assert "ettin" in plain


def test_data_modules_import_without_torch_transformers_or_megatron() -> None:
    code = (
        "import sys, pkgutil, importlib, megatron_ettin.data as d;"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(d.__path__, 'megatron_ettin.data.')];"
        "print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_documents_of_many_chunks_matches_single_lookups(prepared: Dataset) -> None:
    chunks = np.random.default_rng(0).integers(0, prepared.num_chunks, 500)
    spans = prepared.documents_of(chunks)
    one_by_one = [prepared.document_of(int(i)) for i in chunks]
    together = zip(spans.source, spans.document_id, spans.start_token.tolist(), spans.document.tolist(), strict=True)
    assert list(together) == one_by_one
    assert spans.special_tokens.tolist() == [2] * 500
    assert prepared.lengths_of(chunks).tolist() == [len(prepared.chunk(int(i))) for i in chunks]
    with pytest.raises(IndexError):
        prepared.documents_of([prepared.num_chunks])
