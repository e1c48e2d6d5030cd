"""`ettin inspect --verify` names every bad file and its damaged bytes and exits with 2; a sound dataset passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_ettin.base import digests
from megatron_ettin.base.digests import damaged_ranges, shard_digest
from megatron_ettin.cli.main import main
from tests.data.corpora import prepare_here, write_jsonl

BLOCK_BYTES = 1 << 16


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Make blocks so small that a small shard has several."""
    with mock.patch.object(digests, "SHARD_BLOCK_BYTES", BLOCK_BYTES):
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, small_blocks: None) -> Path:
    """Make an undamaged dataset: a shard of several blocks, a held-out part and a packing index."""
    folder = tmp_path_factory.mktemp("verify")
    source = write_jsonl(folder / "corpus.jsonl", 150)
    options = ("--chunk-tokens", 128, "--holdout", 0.05, "--seq-len", 128, "--workers", 1)
    assert prepare_here(source, "--out", folder / "dataset", *options) == 0
    assert (folder / "dataset" / "shard_00000.bin").stat().st_size > BLOCK_BYTES
    return folder / "dataset"


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main(["inspect", str(folder), "--verify"])
    return status, capsys.readouterr().err.strip().splitlines()


def flip(path: Path, *offsets: int) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def test_verify_sound_dataset_reports_nothing(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(sound, capsys) == (0, [])
    assert main(["inspect", str(sound), "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is True
    assert "bytes in" in report["verification"]


def test_verify_flipped_bit_names_the_damaged_byte_range(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "shard_00000.bin"
    flip(file, BLOCK_BYTES + 7)
    status, lines = verify(copy, capsys)
    expected = f"{file}: damaged, within bytes {BLOCK_BYTES} to {file.stat().st_size - 1}"
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("ettin inspect: 1 of ")
    assert lines[0].endswith(expected)


def test_damaged_ranges_merge_adjacent_blocks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * BLOCK_BYTES + 3))
    before = shard_digest(path)
    assert list(damaged_ranges(before.blocks, before)) == []
    flip(path, 5, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES + 2)
    ranges = [(0, BLOCK_BYTES), (2 * BLOCK_BYTES, 4 * BLOCK_BYTES), (5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 3)]
    assert list(damaged_ranges(before.blocks, shard_digest(path))) == ranges


def test_verify_reports_every_bad_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, plan = copy / "shard_00000.idx", copy / "rows_128" / "chunks.int64"
    index.write_bytes(index.read_bytes()[:-10])
    (copy / "heldout" / "shard_00000.starts.npy").unlink()
    flip(plan, 0)
    size = index.stat().st_size
    status, lines = verify(copy, capsys)
    assert status == 2
    assert len(lines) == 4
    assert lines[0] == f"{index}: truncated, bytes {size} to {size + 9} are missing"
    assert "heldout/shard_00000.starts.npy: missing (the manifest lists it with" in lines[1]
    assert lines[2].startswith(f"{plan}: damaged")
    assert "remove its folder" in lines[2]
    assert lines[3].startswith("ettin inspect: 3 of ")
    assert lines[3].endswith(", and 2 more")
    assert main(["inspect", str(copy), "--verify", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is False
    assert report["problems"] == lines[:3]


def test_verify_damaged_checksums_do_not_hide_damaged_shard(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "shard_00000.bin", 9)
    flip(copy / "shard_00000.checksums.json", 0)
    status, lines = verify(copy, capsys)
    assert status == 2
    assert "shard_00000.checksums.json, which lists its blocks, is damaged too" in lines[0]
    assert "shard_00000.checksums.json: damaged, its sha256 is not the manifest's" in lines[1]


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_verify_record_with_damaged_digest_key_is_reported(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A record whose digest key is damaged must not pass for an old record, which has no digest."""
    (path,) = [*copy.glob(name), *copy.glob(f"rows_*/{name}")]
    flip(path, path.read_bytes().index(b"content_sha256") + 3)
    status, lines = verify(copy, capsys)
    assert status == 2
    assert str(path) in lines[0]
    assert "damaged" in lines[0]
