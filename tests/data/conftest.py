from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.corpora import files_of, prepare_here, write_jsonl
from tests.data.small_tasks import arguments_for, start, write_inputs


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """400 documents in chunks of 128, with a held-out part. Read-only."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "corpus.jsonl", 400)
    assert (
        prepare_here(source, "--out", folder / "dataset", "--chunk-tokens", 128, "--holdout", 0.1, "--workers", 1) == 0
    )
    return open_dataset(folder / "dataset")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A second source of shorter documents."""
    folder = tmp_path_factory.mktemp("other")
    source = write_jsonl(folder / "short.jsonl", 150, seed=7, longest_words=80)
    assert prepare_here(source, "--out", folder / "dataset", "--chunk-tokens", 128, "--workers", 1) == 0
    return open_dataset(folder / "dataset")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of several tasks (tests/data/small_tasks.py). Read-only."""
    return write_inputs(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="session")
def large_dataset(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one uninterrupted process makes of the inputs of `large`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    running = start(arguments_for(large, folder / "out", 1), folder / "small_tasks.py")
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    return files_of(folder / "out")
