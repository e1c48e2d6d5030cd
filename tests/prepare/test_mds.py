"""`ettin prepare` reads MDS directories that mosaicml-streaming wrote (tests/fixtures/mds/README.md)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_ettin.base.errors import UserError
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.readers.mds import array_rows
from tests.data.corpora import files_of
from tests.prepare.held import documents, prepared, refusal, write_json

FIXTURES = Path(
    os.environ.get("ETTIN_MDS_FIXTURES", Path(__file__).parents[1] / "fixtures" / "mds")
)  # nightly: new ones
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
CLS, SEP = 50281, 50282


def inner(ids: list[int]) -> list[int]:
    return ids[ids[0] == CLS : len(ids) - (ids[-1] == SEP)]


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, folder / "in"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_prepare_mds_encodings_hashes_and_codecs_are_read_or_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "hashes/br":
        message = refusal(capsys, tmp_path, FIXTURES / name)
        assert "shard.00000.mds.br: compressed by 'br'; zstd and uncompressed are read" in message
        return
    actual = prepared(tmp_path, FIXTURES / name)
    assert [ids for _, _, ids in actual] == [inner(ids) for ids in EXPECTED[name]]
    assert [document for _, document, _ in actual] == [f"{Path(name).name}-{i}" for i in range(len(actual))]
    by_length = prepared(tmp_path, FIXTURES / name, options=("--id-key", "len"))
    assert [document for _, document, _ in by_length] == [str(len(ids)) for ids in EXPECTED[name]]


def test_prepare_mds_release_layout_reads_every_part_in_order(tmp_path: Path) -> None:
    """Read subdirectories of token shards, uint32 uncompressed and uint16 in zstd, and no README next to them."""
    root = tmp_path / "tokens"
    for part in ("part0", "part1"):
        shutil.copytree(FIXTURES / "tokens" / part, root / part)
    (root / "README.md").write_text("# A description\n")
    expected = [
        (sample["id"], inner(sample["input_ids"]))
        for part in ("part0", "part1")
        for sample in json.loads((FIXTURES / "tokens" / f"{part}.expected.json").read_text())
    ]
    actual = prepared(tmp_path, root)
    assert [(document, ids) for _, document, ids in actual] == expected
    assert actual[0][0] == "tokens/part0/shard.00000.mds"


def test_prepare_mds_text_column_is_read_and_named_by_id(tmp_path: Path, tokenizer: Tokenizer) -> None:
    actual = prepared(tmp_path, FIXTURES / "text")
    assert len(actual) == 12
    raw = (FIXTURES / "text" / "shard.00000.mds").read_bytes()
    for _, _, ids in actual:
        assert tokenizer.decode(ids).removeprefix(" ").encode() in raw
    by_number = prepared(tmp_path, FIXTURES / "text", options=("--id-key", "absent"))
    assert [document for _, document, _ in by_number] == [f"text/shard.00000.mds#{i}" for i in range(12)]
    by_id = prepared(tmp_path, FIXTURES / "text", options=("--text-key", "id", "--id-key", "absent"))
    assert [tokenizer.decode(ids).strip() for _, _, ids in by_id] == [document for _, document, _ in actual]


def test_prepare_mds_root_index_decides_which_shards_are_read(tmp_path: Path) -> None:
    names = ("nested/a", "nested/b")
    without = prepared(tmp_path, FIXTURES / "nested")
    assert [ids for _, _, ids in without] == [inner(ids) for name in names for ids in EXPECTED[name]]
    root = copied("nested", tmp_path)
    shutil.copy(FIXTURES / "nested.merged.index.json", root / "index.json")
    with_root = prepared(tmp_path, root)
    assert [entry[1:] for entry in with_root] == [entry[1:] for entry in without]
    assert with_root[0][0] == "in/a/shard.00000.mds"
    deep = tmp_path / "deep"
    shutil.copytree(FIXTURES / "nested" / "b", deep / "x" / "y")
    assert [entry[2] for entry in prepared(tmp_path, deep)] == [inner(ids) for ids in EXPECTED["nested/b"]]
    index = json.loads((root / "index.json").read_text())
    index["shards"] = index["shards"][1:2]
    write_json(root / "index.json", index)
    chosen = prepared(tmp_path, root)
    assert {source for source, _, _ in chosen} == {"in/" + index["shards"][0]["raw_data"]["basename"]}
    by_index = prepared(tmp_path, root / "index.json")
    assert [entry[1:] for entry in by_index] == [entry[1:] for entry in chosen]


def test_prepare_mds_raw_shard_is_preferred_to_compressed(tmp_path: Path) -> None:
    root = copied("hashes/sha1", tmp_path)
    packed = root / "shard.00000.mds.zstd"
    (root / "shard.00000.mds").write_bytes(zstandard.decompress(packed.read_bytes()))
    packed.write_bytes(b"not looked at")
    assert [ids for _, _, ids in prepared(tmp_path, root)] == [inner(ids) for ids in EXPECTED["hashes/sha1"]]


def test_prepare_mds_index_naming_absent_shard_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("tokens/part0", tmp_path)
    (root / "shard.00001.mds").unlink()
    message = refusal(capsys, tmp_path, root)
    assert f"{root}/index.json: names the shard 'shard.00001.mds', which is not there" in message
    shutil.copy(FIXTURES / "nested.merged.index.json", root / "index.json")
    assert "names the shard 'a/shard.00000.mds'" in refusal(capsys, tmp_path, root)


def test_prepare_mds_shards_without_index_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("tokens/part0", tmp_path)
    (root / "index.json").unlink()
    assert "holds MDS shards (shard.00000.mds) but no index.json" in refusal(capsys, tmp_path, root)
    assert "name the one with index.json" in refusal(capsys, tmp_path, root / "shard.00000.mds")


@pytest.mark.parametrize("algorithm", ["sha1", "md5", "sha256", "xxh64", "xxh3_64"])
def test_prepare_mds_flipped_bit_is_found_by_its_hash(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if algorithm.startswith("xx"):
        pytest.importorskip("xxhash")
    root = copied(f"hashes/{algorithm}", tmp_path)
    index = json.loads((root / "index.json").read_text())
    shard = index["shards"][0]
    raw = bytearray(zstandard.decompress((root / "shard.00000.mds.zstd").read_bytes()))
    raw[-2] ^= 1  # changes the last sample's "id" or ids, so the shard can still be parsed
    (root / "shard.00000.mds").write_bytes(raw)
    shard["zip_data"] = None
    write_json(root / "index.json", index)
    message = refusal(capsys, tmp_path, root)
    assert f"shard.00000.mds: damaged, its {algorithm} is " in message
    assert "index.json says " in message


def changed_index(root: Path, **changes: object) -> None:
    index = json.loads((root / "index.json").read_text())
    index["shards"][0].update(changes)
    write_json(root / "index.json", index)


def without_hashes(root: Path) -> None:
    shard = json.loads((root / "index.json").read_text())["shards"][0]
    changed_index(root, **{key: {**shard[key], "hashes": {}} for key in ("raw_data", "zip_data") if shard.get(key)})


def test_prepare_mds_damaged_shard_or_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path) -> str:
        return refusal(capsys, tmp_path, folder)

    def fresh(name: str) -> Path:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        return copied(name, tmp_path)

    root = fresh("tokens/part0")
    shard = root / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert f"shard.00000.mds: truncated, 7491 bytes, {root}/index.json says 7492" in refused(root)

    begin = int.from_bytes(whole[4:8], "little")
    shard.write_bytes(whole[:begin] + b"\xff" * 4 + whole[begin + 4 :])
    assert "shard.00000.mds: damaged, its sha1 is" in refused(root)  # if the index has a hash, it is checked first
    without_hashes(root)
    assert "shard.00000.mds#0: damaged sample" in refused(root)
    shard.write_bytes(b"\xff" * 4 + whole[4:])
    assert "holds 4294967295 samples" in refused(root)
    shard.write_bytes(whole[:8] + b"\xff" * 4 + whole[12:])
    assert "damaged table of offsets at sample 1" in refused(root)

    root = fresh("tokens/part1")
    packed = root / "shard.00000.mds.zstd"
    half = packed.read_bytes()[: packed.stat().st_size // 2]
    packed.write_bytes(half)
    assert "shard.00000.mds.zstd: truncated" in refused(root)
    index = json.loads((root / "index.json").read_text())
    changed_index(root, zip_data={**index["shards"][0]["zip_data"], "bytes": len(half)})
    assert "shard.00000.mds.zstd: damaged, its sha1 is" in refused(root)
    without_hashes(root)
    assert f"shard.00000.mds.zstd: zstd data ends in the middle, at byte {len(half)}: truncated" in refused(root)

    root = fresh("text")
    changed_index(root, version=1)
    assert "shard 0 is format 'mds' version 1" in refused(root)
    changed_index(root, version=2, column_names=["id", "texts"])
    expected = (
        "no text column 'text' (did you mean 'texts'?) and no token column 'input_ids'; columns found: id (str), "
    )
    assert expected + "texts (str)" in refused(root)
    changed_index(root, column_names=["id"])
    assert "shard 0 is damaged" in refused(root)
    changed_index(root, column_names=["id", "text"], raw_data={"basename": [0], "bytes": 1, "hashes": {}})
    assert "a list is no name of a file" in refused(root)
    changed_index(root, zip_data={"basename": "x"})
    assert "shard 0 is damaged (KeyError: 'bytes')" in refused(root)
    (root / "index.json").write_text("{")
    assert "index.json: not an MDS index" in refused(root)
    (root / "index.json").write_text('{"version": 3, "shards": []}')
    assert "MDS version 3; version 2 is read" in refused(root)


def test_prepare_mds_column_that_is_not_integers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("dtypes/static_uint32", tmp_path)
    for encoding in ("ndarray:float32", "bytes"):
        changed_index(root, column_encodings=["str", encoding, "int"])
        message = refusal(capsys, tmp_path, root)
        assert f"column 'input_ids' is {encoding}, not a list of integers" in message
    message = refusal(capsys, tmp_path, FIXTURES / "text", "--text-key", "absent", "--tokens-key", "id")
    assert "column 'id' is str, not a list of integers" in message


def test_prepare_mds_ids_outside_vocabulary_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "tokenizer"
    small.mkdir()
    (small / "tokenizer.json").write_text(SMALL_TOKENIZER)
    message = refusal(capsys, tmp_path, FIXTURES / "tokens" / "part0", "--tokenizer", small)
    first = json.loads((FIXTURES / "tokens" / "part0.expected.json").read_text())[0]["input_ids"][0]
    assert f"shard.00000.mds#0: token id {first} at position 0; the tokenizer's vocabulary has ids 0 to 2" in message
    message = refusal(capsys, tmp_path, FIXTURES / "dtypes" / "static_int8", "--tokenizer", small)
    assert f"shard.00000.mds#0: token id {EXPECTED['dtypes/static_int8'][0][0]} at position 0" in message


SMALL_TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    }
)


def test_prepare_mds_compressed_and_raw_shards_give_the_same_bytes(tmp_path: Path) -> None:
    plain = copied("tokens/part1", tmp_path)
    for packed in plain.glob("*.zstd"):
        packed.with_suffix("").write_bytes(zstandard.decompress(packed.read_bytes()))
        packed.unlink()
    unpacked, packed_ = prepared(tmp_path, plain), prepared(tmp_path, FIXTURES / "tokens" / "part1")
    assert [entry[1:] for entry in unpacked] == [entry[1:] for entry in packed_]
    assert (tmp_path / "out0" / "shard_00000.bin").read_bytes() == (tmp_path / "out1" / "shard_00000.bin").read_bytes()
    assert len(documents(tmp_path / "out1")) == 40


def test_prepare_mds_input_location_does_not_change_the_dataset(tmp_path: Path) -> None:
    actual = []
    for folder in ("here", "there"):
        shutil.copytree(FIXTURES / "tokens", tmp_path / folder / "tokens")
        prepared(tmp_path, tmp_path / folder / "tokens")
        actual.append(files_of(tmp_path / f"out{len(actual)}"))
    assert actual[0] == actual[1]


def test_prepare_mds_hash_of_compressed_file_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("hashes/sha1", tmp_path)
    shard = json.loads((root / "index.json").read_text())["shards"][0]
    changed_index(root, zip_data={**shard["zip_data"], "hashes": {"sha1": "0" * 40}})
    message = refusal(capsys, tmp_path, root)
    assert f"shard.00000.mds.zstd: damaged, its sha1 is {shard['zip_data']['hashes']['sha1']}, " in message


@pytest.mark.parametrize("encoding", ["ndarray:uint16:2,3", "ndarray:uint16", "ndarray"])
def test_array_rows_matrix_yields_one_sequence_per_row(encoding: str) -> None:
    matrix = np.arange(6, dtype="<u2").reshape(2, 3)
    shape = b"" if encoding.endswith("2,3") else bytes([2 << 2, 2, 3])
    raw = (b"\x10" if encoding == "ndarray" else b"") + shape + matrix.tobytes()
    assert [row.tolist() for row in array_rows(raw, encoding, "here")] == matrix.tolist()
    with pytest.raises(UserError, match=f"here: damaged ndarray of {len(raw) - 2} bytes"):
        array_rows(raw[:-2], encoding, "here")


@pytest.mark.parametrize(
    ("encoding", "raw", "rows"),
    [
        ("ndarray:uint16:0", b"", [[]]),
        ("ndarray:uint16", bytes([1 << 2, 0]), [[]]),
        ("ndarray:uint16", bytes([2 << 2, 2, 0]), [[], []]),
    ],
)
def test_array_rows_without_elements_are_empty_sequences(encoding: str, raw: bytes, rows: list[list[int]]) -> None:
    assert [row.tolist() for row in array_rows(raw, encoding, "here")] == rows
