"""Folders and checkpoints that tests of conversion copy and damage."""

from __future__ import annotations

import shutil

import pytest

from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from tests.convert.folders import make_folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Return a folder with `theirs`, a sharded Hugging Face folder, and `checkpoint`, imported from it. Read-only."""
    room = tmp_path_factory.mktemp("sources")
    make_folder(room / "whole", "mlm")
    from_hf(room / "whole", room / "checkpoint")
    to_hf(room / "checkpoint", room / "theirs", ExportOptions(max_shard_bytes=100_000))
    return room


@pytest.fixture
def theirs(sources, tmp_path):
    return shutil.copytree(sources / "theirs", tmp_path / "theirs")


@pytest.fixture
def checkpoint(sources, tmp_path):
    return shutil.copytree(sources / "checkpoint", tmp_path / "checkpoint")
