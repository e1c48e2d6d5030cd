"""Inputs that hold token ids: parquet, saved datasets, Megatron's .bin/.idx, a dataset of `ettin prepare`."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.indexed import CODE_OF_DTYPE, DTYPE_OF_CODE, HEADER, MAGIC, index_bytes
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare import inputs
from megatron_ettin.prepare.input_file import InputFile
from megatron_ettin.prepare.readers.document import Document, without_outer_specials
from megatron_ettin.prepare.task import document_key, is_held_out
from tests.data.corpora import files_of, prepare_here, words, write_jsonl
from tests.data.others import called
from tests.prepare.held import documents, prepared, refusal

CLS, SEP, PAD = 50281, 50282, 50283
RNG = np.random.default_rng(3)
DOCUMENTS = [RNG.integers(5, 50_000, size).tolist() for size in (1, 5, 300, 2, 40, 77, 1_022, 3_000)]
FRAMES = [  # special tokens that pipelines put around a document's ids
    lambda ids: ids,
    lambda ids: [CLS, *ids, SEP],
    lambda ids: [CLS, *ids],
    lambda ids: [*ids, SEP],
    lambda ids: [CLS, *ids, SEP, PAD, PAD, PAD],
    lambda ids: [CLS, *ids, PAD],
]
FRAMED = [FRAMES[i % len(FRAMES)](ids) for i, ids in enumerate(DOCUMENTS)]


@settings(deadline=None)
@given(ids=st.lists(st.integers(5, 9), max_size=6), frame=st.integers(0, len(FRAMES) - 1), dtype=st.sampled_from("Hiq"))
def test_without_outer_specials_removes_one_frame_only(
    tokenizer: Tokenizer, ids: list[int], frame: int, dtype: str
) -> None:
    framed = np.array(FRAMES[frame](ids), dtype)
    assert without_outer_specials(framed, tokenizer).tolist() == ids
    twice = np.array([CLS, CLS, *ids, SEP, SEP], dtype)
    assert without_outer_specials(twice, tokenizer).tolist() == [CLS, *ids, SEP]
    assert without_outer_specials(np.array([CLS, PAD, PAD], dtype), tokenizer).tolist() == []


@pytest.mark.parametrize("column_type", ["list<uint16>", "large_list<int64>", "list<int32>"])
def test_prepare_token_columns_of_parquet_and_saved_dataset_keep_ids(column_type: str, tmp_path: Path) -> None:
    value = {"uint16": pyarrow.uint16(), "int64": pyarrow.int64(), "int32": pyarrow.int32()}[
        column_type.split("<")[1][:-1]
    ]
    lists = pyarrow.large_list(value) if column_type.startswith("large") else pyarrow.list_(value)
    columns = {"input_ids": pyarrow.array(FRAMED, lists), "id": [f"d{i}" for i in range(len(FRAMED))]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet", row_group_size=3)
    actual = prepared(tmp_path, tmp_path / "in.parquet")
    assert [ids for _, _, ids in actual] == DOCUMENTS
    assert [name for _, name, _ in actual] == [f"d{i}" for i in range(len(FRAMED))]
    if column_type == "list<int32>":
        datasets.Dataset(pyarrow.table(columns).rename_columns(["tokens", "id"])).save_to_disk(str(tmp_path / "saved"))
        saved = prepared(tmp_path, tmp_path / "saved", options=("--tokens-key", "tokens"))
        assert [ids for _, _, ids in saved] == DOCUMENTS


def test_prepare_token_ids_are_chunked_like_text_and_chunks_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = words(900, 5)
    ids = tokenizer.encode_batch([text])[0]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}))
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[CLS, *ids, SEP]]}), tmp_path / "in.parquet")
    rule = ("--chunk-tokens", 128, "--workers", 1, "--min-chunk-tokens", 0, "--skip-tokens", 0)
    for name in ("in.jsonl", "in.parquet"):
        assert prepare_here(tmp_path / name, "--out", tmp_path / f"{name}.out", *rule) == 0
    shards = [(tmp_path / f"{name}.out" / "shard_00000.bin").read_bytes() for name in ("in.jsonl", "in.parquet")]
    assert shards[0] == shards[1]
    chunks = [[CLS, *range(10, 10 + size), SEP] for size in (126, 126, 126, 20, 1)]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": chunks}), tmp_path / "chunks.parquet")
    recipe = ("--chunk-tokens", 128, "--workers", 1)
    assert prepare_here(tmp_path / "chunks.parquet", "--out", tmp_path / "chunks", *recipe) == 0
    dataset = open_dataset(tmp_path / "chunks")
    assert [dataset.chunk(i).tolist() for i in range(dataset.num_chunks)] == chunks


def test_holdout_of_token_inputs_depends_on_the_ids(tmp_path: Path) -> None:
    ids = [[10, 20 + i % 40, 30] for i in range(120)]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": ids}), tmp_path / "in.parquet")
    assert prepare_here(tmp_path / "in.parquet", "--out", tmp_path / "out", "--holdout", 0.3, "--workers", 1) == 0
    sides = [{tuple(token_ids) for _, _, token_ids in documents(tmp_path / "out" / part)} for part in (".", "heldout")]
    assert sides[0] | sides[1] == {tuple(token_ids) for token_ids in ids}
    assert not sides[0] & sides[1]
    for token_ids in sides[1]:
        key = hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).hexdigest()
        file = InputFile("", "", "", "parquet", None, 0)
        assert document_key(Document(file, "", tokens=np.array(token_ids, np.uint32))) == key
        assert is_held_out(key, 0.3)


def write_pair(prefix: Path, sequences: list[list[int]], per_document: list[int], dtype: np.dtype) -> None:
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(ids, dtype).tobytes() for ids in sequences))
    boundaries = np.cumsum([0, *per_document])
    prefix.with_suffix(".idx").write_bytes(index_bytes(np.array([len(s) for s in sequences]), boundaries, dtype))


@pytest.mark.parametrize("code", DTYPE_OF_CODE)
def test_prepare_megatron_pair_of_any_dtype_keeps_documents(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = DTYPE_OF_CODE[code]
    largest = min(int(np.iinfo(dtype).max), 50_000)
    rng = np.random.default_rng(code)
    frame = (lambda ids: [CLS, *ids, SEP]) if largest == 50_000 else (lambda ids: ids)
    parts = [[rng.integers(5, largest, 1 + 13 * i % 29).tolist() for i in range(1 + n % 3)] for n in range(40)]
    sequences = [frame(ids) for document in parts for ids in document]
    (tmp_path / "pairs").mkdir()
    write_pair(tmp_path / "pairs" / "corpus_text_document", sequences, [len(d) for d in parts], dtype)
    expected = [[i for ids in document for i in ids] for document in parts]
    prefix = tmp_path / "pairs" / "corpus_text_document"
    actual = prepared(tmp_path, tmp_path / "pairs")
    assert [ids for _, _, ids in actual] == expected
    assert [name for _, name, _ in actual] == [f"pairs/corpus_text_document#{i}" for i in range(40)]
    monkeypatch.setattr(inputs, "TASK_BYTES", 97)
    monkeypatch.setattr(inputs, "SMALLEST_TASK_BYTES", 97)
    assert [ids for _, _, ids in prepared(tmp_path, prefix)] == expected
    assert len(list((tmp_path / "out1").glob("*.bin"))) > 3


def test_prepare_megatron_pair_is_named_by_prefix_or_either_file(tmp_path: Path) -> None:
    write_pair(tmp_path / "pair", FRAMED, [1] * len(FRAMED), np.dtype("<u2"))
    for name in ("pair", "pair.idx", "pair.bin"):
        assert [ids for _, _, ids in prepared(tmp_path, tmp_path / name)] == DOCUMENTS


def test_prepare_pair_written_by_megatron_core_is_read(tmp_path: Path) -> None:
    (tmp_path / "documents.json").write_text(json.dumps(FRAMED))
    called("write_by_core", tmp_path / "core", tmp_path / "documents.json")
    assert [ids for _, _, ids in prepared(tmp_path, tmp_path / "core")] == DOCUMENTS


def test_prepare_own_dataset_rechunked_keeps_documents_and_holdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents, ids and the held-out part stay, and the bytes equal those of preparing the text with these chunks."""
    source = write_jsonl(tmp_path / "in.jsonl", 30, longest_words=300)
    plain = ("--chunking", "plain", "--workers", 1)
    assert prepare_here(source, "--out", tmp_path / "short", "--chunk-tokens", 32, "--holdout", 0.2, *plain) == 0
    assert prepare_here(source, "--out", tmp_path / "long", "--chunk-tokens", 256, "--holdout", 0.2, *plain) == 0
    for part in (".", "heldout"):
        again = prepared(tmp_path, tmp_path / "short" / part, options=("--chunk-tokens", 256))
        assert [entry[1:] for entry in again] == [entry[1:] for entry in documents(tmp_path / "long" / part)]
    assert (tmp_path / "out0" / "shard_00000.bin").read_bytes() == (tmp_path / "long" / "shard_00000.bin").read_bytes()

    manifest = json.loads((tmp_path / "short" / "manifest.json").read_text())
    del manifest["content_sha256"]
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (tmp_path / "short" / "manifest.json").write_text(json.dumps(manifest))
    message = refusal(capsys, tmp_path, tmp_path / "short")
    assert "shard_00000.bin: made with another tokenizer: 000000000000..., " in message
    (tmp_path / "short" / "shard_00000.bin").unlink()
    message = refusal(capsys, tmp_path, tmp_path / "short")
    assert "manifest.json: names shard_00000.bin, which is not there" in message


def test_prepare_token_ids_outside_vocabulary_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "the tokenizer's vocabulary has ids 0 to 50367"
    rows = [[1, 2], [CLS, 7, 8, 50_368, 9], [-1]]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), tmp_path / "in.parquet")
    message = refusal(capsys, tmp_path, tmp_path / "in.parquet")
    assert f"in.parquet#1: token id 50368 at position 3; {rule}" in message
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows[::2]}), tmp_path / "in.parquet")
    assert f"in.parquet#1: token id -1 at position 0; {rule}" in refusal(capsys, tmp_path, tmp_path / "in.parquet")
    write_pair(tmp_path / "pair", [[1, 2], [3], [4, 60_000]], [1, 2], np.dtype("<u2"))
    message = refusal(capsys, tmp_path, tmp_path / "pair")
    assert f"pair.bin: document 1: token id 60000 at position 2; {rule}" in message


def test_prepare_null_token_ids_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows, message in (([[1], None], "#1: 'input_ids' is null"), ([[1], [2, None]], "#1: 'input_ids' has a null")):
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), tmp_path / "in.parquet")
        assert message in refusal(capsys, tmp_path, tmp_path / "in.parquet")


def test_prepare_damaged_megatron_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "pair"
    dtype = np.dtype("<i4")
    index, tokens = tmp_path / "pair.idx", tmp_path / "pair.bin"
    write_pair(prefix, [[1, 2], [3], [4, 5]], [1, 2], dtype)
    whole = index.read_bytes()

    def refused(content: bytes) -> str:
        index.write_bytes(content)
        return refusal(capsys, tmp_path, prefix)

    def header(**changes: int) -> bytes:
        fields = {"version": 1, "code": CODE_OF_DTYPE[dtype], "sequences": 3, "boundaries": 3, **changes}
        return HEADER.pack(MAGIC, *fields.values()) + whole[HEADER.size :]

    assert "pair.idx: not a Megatron index: begins with b'NOTMAGIC!'" in refused(b"NOTMAGIC!" + whole[9:])
    assert "pair.idx: 20 bytes, too short" in refused(whole[:20])
    assert f"pair.idx: truncated, {len(whole) - 1} bytes" in refused(whole[:-1])
    assert "pair.idx: its values are float32, which are no token ids" in refused(header(code=7))
    assert "pair.idx: unknown dtype code 77" in refused(header(code=77))
    assert "pair.idx: Megatron index version 2; version 1 is read" in refused(header(version=2))
    last = whole[:-8] + (2).to_bytes(8, "little")
    assert "pair.idx: its documents span sequences 0 to 2, not 0 to 3" in refused(last)
    turned = whole[:-16] + (4).to_bytes(8, "little") + whole[-8:]
    assert "pair.idx: damaged at document 1: its sequences do not ascend" in refused(turned)
    index.write_bytes(whole)
    tokens.write_bytes(tokens.read_bytes()[:-1])
    message = refusal(capsys, tmp_path, prefix)
    assert "pair.bin: truncated, 19 bytes, but by its index sequence 2 lies in bytes 12 to 20" in message
    tokens.unlink()
    assert "pair.idx: no .bin of that name in its folder" in refusal(capsys, tmp_path, index)
    index.rename(tmp_path / "other.idx")
    tokens.write_bytes(b"1234")
    message = refusal(capsys, tmp_path, tokens, "--format", "indexed")
    assert "a Megatron dataset is a pair, name.bin and name.idx; the .idx is not there" in message


def test_prepare_directory_with_foreign_idx_skips_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pack.idx").write_bytes(b"\xfftOc\x00\x00\x00\x02")
    (tmp_path / "in" / "a.txt").write_text("A text.")
    assert [source for source, _, _ in prepared(tmp_path, tmp_path / "in")] == ["in/a.txt"]


def test_prepare_remote_token_inputs_match_local(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    fixtures = Path(__file__).parents[1] / "fixtures" / "mds"
    write_pair(tmp_path / "pair", FRAMED, [1] * len(FRAMED), np.dtype("<u2"))
    local = {
        "mds": fixtures / "tokens",
        "pairs/pair.bin": tmp_path / "pair.bin",
        "pairs/pair.idx": tmp_path / "pair.idx",
    }
    source = write_jsonl(tmp_path / "in.jsonl", 10)
    assert prepare_here(source, "--out", tmp_path / "own", "--workers", 1) == 0
    for name, path in {**local, "own": tmp_path / "own"}.items():
        memory.put(str(path), f"{root}/{name}", recursive=path.is_dir())
    names = ("mds", "pairs", "pairs/pair", "own")
    remote = [prepared(tmp_path, f"memory:/{root}/{name}") for name in names]
    paths = (fixtures / "tokens", tmp_path / "pair", tmp_path / "pair.idx", tmp_path / "own")
    here = [prepared(tmp_path, path) for path in paths]
    assert [[ids for _, _, ids in entry] for entry in remote] == [[ids for _, _, ids in entry] for entry in here]
    assert files_of(tmp_path / "out0")["shard_00000.bin"] == files_of(tmp_path / "out4")["shard_00000.bin"]
    memory.rm(root, recursive=True)
