"""Digests of files and of their blocks: they do not depend on how files are read, they name what has changed, and every
format that was ever written can be read."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ettin.base import digests
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import DIGEST, with_digest
from megatron_ettin.checkpoint.integrity import read_entries, seal, verify
from megatron_ettin.train.resume import _share

BLOCK = 1000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(digests, "_READ_BYTES", 300)  # does not divide BLOCK


def sealed(folder: Path, sizes: dict[str, int], seed: int = 1) -> Path:
    folder.mkdir()
    for name, size in sizes.items():
        (folder / name).write_bytes(random.Random(f"{seed} {name}").randbytes(size))
    (folder / "metadata.json").write_text("{}")
    seal(folder)
    return folder


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 17])
def test_digest_at_block_boundaries_equals_hashlib(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    entry = digests.integrity_entry(tmp_path / "file")
    if size <= BLOCK:
        assert entry == {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
    else:
        parts = [content[at : at + BLOCK] for at in range(0, size, BLOCK)]
        assert entry["blocks"] == [hashlib.sha256(part).hexdigest() for part in parts]
        assert (entry["bytes"], entry["block_bytes"]) == (size, BLOCK)
    assert sum(block.size for block in digests.blocks_of("file", entry)) == size
    assert digests.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("at", [0, 999, 1000, 2500, 3010])
def test_verify_changed_byte_names_its_byte_range(tmp_path, at):
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 3011})
    verify(folder)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[at] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    first, last = at // BLOCK * BLOCK, min(at // BLOCK * BLOCK + BLOCK, 3011) - 1
    with pytest.raises(UserError, match=rf"__0_0\.distcp: bytes {first:,} to {last:,}: sha256 .* it has changed"):
        verify(folder)
    verify(folder, checksums=False)
    verify(folder, which=lambda name: name != "__0_0.distcp")


def test_verify_swapped_blocks_are_refused(tmp_path):
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 3 * BLOCK})
    content = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(content[BLOCK : 2 * BLOCK] + content[:BLOCK] + content[2 * BLOCK :])
    with pytest.raises(UserError, match="bytes 0 to 999"):
        verify(folder)


def test_verify_record_with_another_block_size_passes(tmp_path, monkeypatch):
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 5000})
    monkeypatch.setattr(digests, "BLOCK_BYTES", 64)
    verify(folder)


def test_verify_format_1_record_finds_changed_file(tmp_path):
    """Format 1 has one digest per file; it was written until version 2."""
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 3011})
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    paths = [folder / "__0_0.distcp", folder / "metadata.json"]
    files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths}
    (folder / "integrity.json").write_text(json.dumps({"format": 1, "files": files}))
    verify(folder)
    content[1500] ^= 1
    paths[0].write_bytes(content)
    with pytest.raises(UserError, match=r"__0_0\.distcp: sha256 .* it has changed"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "output"),
    [
        ({"format": 3}, "it is of format 3, this version reads 1 to 2"),
        ({"blocks": []}, "has not a digest for each block of its 3011 bytes"),
        ({"blocks": "abcd"}, "has not a digest for each block"),
        ({"blocks": [1, 2, 3, 4]}, "unreadable"),
        ({"block_bytes": 0}, "has not a digest for each block"),
        ({"block_bytes": -1000}, "has not a digest for each block"),
        ({"block_bytes": 1e3}, "has not a digest for each block"),
        ({"block_bytes": True}, "has not a digest for each block"),
        ({"block_bytes": None}, "has not a digest for each block"),
        ({"bytes": 10**12}, "has not a digest for each block"),
        ({"bytes": -1}, "'__0_0.distcp' has -1 bytes"),
        ({"bytes": "3011"}, "'__0_0.distcp' has '3011' bytes"),
    ],
)
def test_read_entries_malformed_entry_is_refused(tmp_path, change, output):
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 3011})
    record = json.loads((folder / "integrity.json").read_text())
    (record if "format" in change else record["files"]["__0_0.distcp"]).update(change)
    record.pop(DIGEST)
    (folder / "integrity.json").write_text(json.dumps(with_digest(record)))
    with pytest.raises(UserError, match=r"integrity\.json: unreadable") as refused:
        read_entries(folder)
    assert output in str(refused.value)


def test_read_entries_flipped_bit_is_refused_or_harmless(tmp_path):
    """A change that is still accepted must leave the same content, with other whitespace at most."""
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 2011})
    whole = (folder / "integrity.json").read_bytes()
    read = read_entries(folder)
    for at in range(len(whole)):
        for flip in (1, 64):
            changed = bytearray(whole)
            changed[at] ^= flip
            (folder / "integrity.json").write_bytes(changed)
            try:
                assert read_entries(folder) == read, (at, flip)
                assert json.loads(changed) == json.loads(whole), (at, flip)
            except UserError as error:
                assert "integrity.json: unreadable" in str(error)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_share_over_ranks_covers_every_block_evenly(tmp_path, world):
    """Every block is hashed exactly once, and no rank has more than one block more than another."""
    folder = sealed(tmp_path / "c", {f"__{rank}_0.distcp": 4 * BLOCK for rank in range(12)} | {"common.pt": 10})
    shares = [
        _share(SimpleNamespace(rank=rank, topology=SimpleNamespace(world=world)), folder) for rank in range(world)
    ]
    listed = [(block.name, block.first) for share in shares for block in share]
    assert listed == [(f"__{rank}_0.distcp", at * BLOCK) for rank in range(12) for at in range(4)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_share_with_one_file_per_rank_gives_each_its_own(tmp_path):
    folder = sealed(tmp_path / "c", {f"__{rank}_0.distcp": 2 * BLOCK for rank in range(12)})
    for rank in range(12):
        share = _share(SimpleNamespace(rank=rank, topology=SimpleNamespace(world=12)), folder)
        assert {block.name for block in share} == {f"__{rank}_0.distcp"}


def test_in_threads_first_failure_stops_the_rest():
    begun, failed = [], threading.Event()

    def fail(item: int) -> None:
        begun.append(item)
        if item:
            failed.wait(60)
        failed.set()
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        digests.in_threads(fail, range(1000))
    assert len(begun) < 1000


def test_verify_unreadable_file_is_named(tmp_path, monkeypatch):
    folder = sealed(tmp_path / "c", {"__0_0.distcp": 3011})

    def broken(path: Path, first: int = 0, size: int | None = None) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_ettin.checkpoint.integrity.sha256", broken)
    with pytest.raises(UserError, match=r"__0_0\.distcp: cannot be read \(Input/output error\)"):
        verify(folder)
