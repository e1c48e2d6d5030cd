"""Folders that are either complete or absent, and locks that another process holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_ettin.base.files import LockHeldError, atomic_folder, try_lock


def test_atomic_folder_replaces_the_former_one_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_folder(folder) as building:
            assert building.name.startswith(".tmp-folder-")
            (building / content).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    (tmp_path / "other").mkdir()
    assert folder.stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(KeyError), atomic_folder(folder):
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "other"}


def test_try_lock_of_a_file_that_is_locked_raises(tmp_path: Path) -> None:
    handles = [os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR) for _ in range(2)]
    assert try_lock(handles[0]) is None
    with pytest.raises(LockHeldError):
        try_lock(handles[1])
    for handle in handles:
        os.close(handle)
