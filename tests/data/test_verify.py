"""`ettin inspect --verify`: every bad file by name, the bytes in which it is wrong, exit 2; and nothing of it in good ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.data.checksums import BLOCK_BYTES, damaged_ranges, digest_of
from tests.data.corpora import prepare_here, write_jsonl


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of more than one block, a held-out part and a row plan."""
    folder = tmp_path_factory.mktemp("verify")
    source = write_jsonl(folder / "corpus.jsonl", 3_600)
    words = ("--chunk-tokens", 128, "--holdout", 0.05, "--seq-len", 128, "--workers", 1)
    assert prepare_here(source, "--out", folder / "dataset", *words) == 0
    assert (folder / "dataset" / "shard_00000.bin").stat().st_size > BLOCK_BYTES
    return folder / "dataset"


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main(["inspect", str(folder), "--verify"])
    return status, capsys.readouterr().err.strip().splitlines()


def flip(path: Path, *places: int) -> None:
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)


def test_a_sound_dataset(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(sound, capsys) == (0, [])
    assert main(["inspect", str(sound), "--verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] is True and "bytes in" in told["verification"]


def test_the_bytes_of_flipped_bits(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "shard_00000.bin"
    flip(file, BLOCK_BYTES + 7)
    status, lines = verify(copy, capsys)
    expected = f"{file}: damaged, within bytes {BLOCK_BYTES} to {file.stat().st_size - 1}"
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("ettin inspect: 1 of ") and lines[0].endswith(expected)


def test_runs_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * BLOCK_BYTES + 3))
    before = digest_of(path)
    assert list(damaged_ranges(before.blocks, before)) == []
    flip(path, 5, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES + 2)
    ranges = [(0, BLOCK_BYTES), (2 * BLOCK_BYTES, 4 * BLOCK_BYTES), (5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 3)]
    assert list(damaged_ranges(before.blocks, digest_of(path))) == ranges


def test_every_bad_file_is_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, plan = copy / "shard_00000.idx", copy / "rows_128" / "chunks.int64"
    index.write_bytes(index.read_bytes()[:-10])
    (copy / "heldout" / "shard_00000.starts.npy").unlink()
    flip(plan, 0)
    size = index.stat().st_size
    status, lines = verify(copy, capsys)
    assert status == 2 and len(lines) == 4
    assert lines[0] == f"{index}: truncated, bytes {size} to {size + 9} are missing"
    assert "heldout/shard_00000.starts.npy: missing (the manifest lists it with" in lines[1]
    assert lines[2].startswith(f"{plan}: damaged") and "remove its folder" in lines[2]
    assert lines[3].startswith("ettin inspect: 3 of ") and lines[3].endswith(", and 2 more")
    assert main(["inspect", str(copy), "--verify", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] is False and told["problems"] == lines[:3]


def test_damaged_digests_do_not_hide_the_damage(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / "shard_00000.bin", 9)
    flip(copy / "shard_00000.checksums.json", 0)
    status, lines = verify(copy, capsys)
    assert status == 2
    assert "shard_00000.checksums.json, which has the places, is damaged too" in lines[0]
    assert "shard_00000.checksums.json: damaged, its sha256 is not the manifest's" in lines[1]


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_record_whose_own_digest_has_lost_its_name(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """It must not pass for one that is older than digests of records."""
    (path,) = [*copy.glob(name), *copy.glob(f"rows_*/{name}")]
    flip(path, path.read_bytes().index(b"content_sha256") + 3)
    status, lines = verify(copy, capsys)
    assert status == 2 and str(path) in lines[0] and "damaged" in lines[0]
