from __future__ import annotations

import pytest

from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.corpora import prepare_here, write_jsonl


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
