"""File systems: what works is told, what does not is a problem, nothing is left behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from megatron_ettin.doctor import files

SMALL = 1 << 16


def states(folder: Path, quick: bool = False) -> dict[str, str]:
    return {one.name.partition(" in ")[0]: one.state for one in files.file_findings(folder, quick, SMALL)}


def test_a_good_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = {one.name.partition(" in ")[0]: one for one in files.file_findings(tmp_path, False, SMALL)}
    assert found["files"].state == "ok" and found["room"].figures["free_bytes"] > 0
    assert found["speed"].figures["write_mb_per_second"] > 0 and found["speed"].figures["fsync_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_quick_has_no_speed(tmp_path: Path) -> None:
    assert set(states(tmp_path, quick=True)) == {"room", "files"}


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert states(tmp_path / "a" / "b", quick=True)["files"] == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert states(tmp_path / "file" / "b") == {"files": "problem"}


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    found = files.file_findings(tmp_path, True)[-1]
    assert found.state == "problem" and "Permission denied" in found.text and found.todo


def test_a_rename_that_goes_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "rename", lambda source, target: None)
    assert states(tmp_path, quick=True)["files"] == "problem"


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    found = files.file_findings(tmp_path, True)[-1]
    assert found.state == "problem" and "fsync" in found.text and "Invalid argument" in found.text


@pytest.mark.parametrize("refuse", [True, False], ids=["no locks", "locks that hold nothing"])
def test_without_locks_is_a_warning(refuse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        if refuse:
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    found = files.file_findings(tmp_path, True)[-1]
    assert found.state == "warning" and "flock" in found.text


@pytest.mark.parametrize(("free", "inodes", "state"), [(1 << 20, 1 << 20, "problem"), (1 << 40, 5, "problem")])
def test_little_room(free: int, inodes: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    values = list(real)
    values[4], values[7] = free // real.f_frsize, inodes
    monkeypatch.setattr(files.os, "statvfs", lambda _: os.statvfs_result(values))
    assert states(tmp_path, quick=True)["room"] == state
