"""Inputs of several tasks, and the dataset that one process makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.conftest import each_tokenizer_once, other, prepared, tokenizer  # noqa: F401 (fixtures)
from tests.data.corpora import files_of
from tests.prepare.small_tasks import arguments_for, prepare_small_tasks, write_inputs


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of inputs that make several tasks (tests/prepare/small_tasks.py). Read-only."""
    return write_inputs(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="session")
def large_dataset_folder(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the dataset that one uninterrupted process makes from the inputs of `large`. Read-only."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert prepare_small_tasks(*arguments_for(large, out, 1)) == 0
    return out


@pytest.fixture(scope="session")
def large_dataset(large_dataset_folder: Path) -> dict[str, bytes]:
    """Return the files of `large_dataset_folder`, name to content."""
    return files_of(large_dataset_folder)
