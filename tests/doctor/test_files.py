"""File-system findings: a failing operation is a problem or a warning, and no file is left behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from megatron_ettin.doctor import files

SMALL = 1 << 16


def states(folder: Path, quick: bool = False) -> dict[str, str]:
    return {one.name.partition(" in ")[0]: one.state for one in files.file_findings(folder, quick, SMALL)}


def test_file_findings_good_folder_is_ok_and_left_unchanged(tmp_path: Path) -> None:
    findings = {one.name.partition(" in ")[0]: one for one in files.file_findings(tmp_path, False, SMALL)}
    assert findings["files"].state == "ok"
    assert findings["room"].figures["free_bytes"] > 0
    assert findings["speed"].figures["write_mb_per_second"] > 0
    assert findings["speed"].figures["fsync_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_file_findings_quick_skips_speed(tmp_path: Path) -> None:
    assert set(states(tmp_path, quick=True)) == {"room", "files"}


def test_file_findings_missing_folder_is_ok_unless_under_a_file(tmp_path: Path) -> None:
    assert states(tmp_path / "a" / "b", quick=True)["files"] == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert states(tmp_path / "file" / "b") == {"files": "problem"}


def test_file_findings_unwritable_folder_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    finding = files.file_findings(tmp_path, True)[-1]
    assert finding.state == "problem"
    assert "Permission denied" in finding.text
    assert finding.todo


def test_file_findings_rename_over_a_folder_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "rename", lambda source, target: None)
    assert states(tmp_path, quick=True)["files"] == "problem"


def test_file_findings_folder_without_fsync_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    finding = files.file_findings(tmp_path, True)[-1]
    assert finding.state == "problem"
    assert "fsync" in finding.text
    assert "Invalid argument" in finding.text


@pytest.mark.parametrize("refuse", [True, False], ids=["no locks", "locks that hold nothing"])
def test_file_findings_without_working_locks_warn(
    refuse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        if refuse:
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    finding = files.file_findings(tmp_path, True)[-1]
    assert finding.state == "warning"
    assert "flock" in finding.text


@pytest.mark.parametrize(("free", "inodes"), [(1 << 20, 1 << 20), (1 << 40, 5)])
def test_file_findings_little_space_or_few_inodes_is_a_problem(
    free: int, inodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    values = list(real)
    values[4], values[7] = free // real.f_frsize, inodes
    monkeypatch.setattr(files.os, "statvfs", lambda _: os.statvfs_result(values))
    assert states(tmp_path, quick=True)["room"] == "problem"
