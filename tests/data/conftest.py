from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from megatron_ettin.data import tokenizer as tokenizers
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.corpora import prepare_here, write_jsonl

LOADED: dict[str, Tokenizer] = {}
SAVED: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def each_tokenizer_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache loaded and saved tokenizers in this process, which spares each `ettin prepare` half a second.

    test_tokenizer.py and all other processes load and save without the cache."""
    read, save = tokenizers.from_file, Tokenizer.save

    def read_once(path: Path, config: dict, name: str) -> Tokenizer:
        content = path.read_bytes() if path.is_file() else b""
        key = hashlib.sha256(content + json.dumps(config).encode()).hexdigest()
        if key not in LOADED:
            LOADED[key] = read(path, config, name)
            LOADED[key].fingerprint  # noqa: B018 (computed once, for the copies too)
        again = copy.copy(LOADED[key])
        again.name = name
        return again

    def save_once(self: Tokenizer, directory: str | Path) -> None:
        if self.fingerprint not in SAVED:
            SAVED[self.fingerprint] = tmp_path_factory.mktemp("saved")
            save(self, SAVED[self.fingerprint])
        Path(directory).mkdir(parents=True, exist_ok=True)
        for file in SAVED[self.fingerprint].iterdir():
            shutil.copyfile(file, Path(directory) / file.name)

    with mock.patch.object(tokenizers, "from_file", read_once), mock.patch.object(Tokenizer, "save", save_once):
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Prepare 400 documents in chunks of at most 128 tokens, with a held-out part. Read-only."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "corpus.jsonl", 400)
    assert (
        prepare_here(source, "--out", folder / "dataset", "--chunk-tokens", 128, "--holdout", 0.1, "--workers", 1) == 0
    )
    return open_dataset(folder / "dataset")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Prepare a second dataset, of shorter documents."""
    folder = tmp_path_factory.mktemp("other")
    source = write_jsonl(folder / "short.jsonl", 150, seed=7, longest_words=80)
    assert prepare_here(source, "--out", folder / "dataset", "--chunk-tokens", 128, "--workers", 1) == 0
    return open_dataset(folder / "dataset")
