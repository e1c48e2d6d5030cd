"""`ettin prepare` reads files that megatron-core's builder wrote, and a run on them lowers its loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.tokenizer import load_tokenizer
from tests.conftest import sentences
from tests.data.corpora import prepare_here
from tests.pool import Pool
from tests.train.runs import train


@pytest.fixture(scope="module")
def written_by_core(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Write a .bin/.idx pair as Megatron-LM's preprocess_data does, and return its prefix.

    Each document is one sequence that ends with [SEP]."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("core") / "text_document"
    tokenizer = load_tokenizer(tiny_tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in tokenizer.encode_batch([sentences(seed, 1 + seed % 12) for seed in range(300)]):
        builder.add_document(torch.tensor([*ids, tokenizer.sep_id]), [len(ids) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_train_on_prepared_megatron_indexed_dataset_learns(
    written_by_core: Path, tiny_tokenizer: Path, tmp_path: Path, pool: Pool
) -> None:
    arguments = ["--tokenizer", tiny_tokenizer, "--chunk-tokens", 48, "--workers", 1]
    assert prepare_here(f"{written_by_core}.idx", "--out", tmp_path / "dataset", *arguments) == 0
    dataset = open_dataset(tmp_path / "dataset")
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert dataset.num_documents == 300
    first = dataset.chunk(0).tolist()
    assert (first[0], first[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert tokenizer.decode(first[1:-1]).strip() == sentences(0, 1)
    run = train(
        pool, 1, tmp_path / "run", tmp_path / "dataset", "clm", ["run.steps=8", "run.tokens=1B", "optim.lr=1e-2"]
    )
    losses = run.column("loss")
    assert losses[-1] < losses[0] - 1.0, json.dumps(losses)
