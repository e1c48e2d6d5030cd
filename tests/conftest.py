"""Fixtures of all tests: the pool of ranks, a SLURM cluster, and a small corpus with a small tokenizer.

Corpus and tokenizer are made by the commands themselves. tests/tiers.py selects tests and spreads them over processes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import forkserver
from tests.launch.cluster import Cluster, require_slurm
from tests.pool import Pool, mutated

pytest_plugins = ["tests.tiers"]
# an example may take long beside other work
hypothesis.settings.register_profile("ettin", deadline=None)
hypothesis.settings.load_profile("ettin")

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


@pytest.fixture(scope="session", autouse=True)
def mistake() -> Iterator[None]:
    """Apply the mistake that tests/test_mutations.py requests, in this process too."""
    with mutated(None):
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    # so that no test's seconds count the server's imports
    forkserver.connect(forkserver.shared()).close()
    shared = Pool()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a SLURM cluster of three nodes on this host."""
    require_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def sentences(seed: int, count: int) -> str:
    """Return text of a small English grammar, regular enough that a tiny model learns it in a few steps."""
    draw = random.Random(seed)
    subjects = ["the reader", "a small model", "the encoder", "the decoder", "every token", "one row of data"]
    verbs = ["follows", "predicts", "attends to", "learns from", "is packed with", "comes before"]
    objects = ["the next word", "a hidden layer", "its neighbours", "the same batch", "a longer context"]
    return " ".join(f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}." for _ in range(count))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a byte-level BPE tokenizer with 320 entries."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), range(20))


def make_tokenizer(folder: Path, seeds: range) -> Path:
    """Train a tokenizer on the sentences of these seeds; other seeds give other merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(seed, 40) for seed in seeds], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token", "mask_token"), SPECIALS, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a dataset of chunks of up to 48 tokens, prepared by `ettin prepare`."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), tiny_tokenizer)


def make_corpus(folder: Path, tokenizer: Path) -> Path:
    """Prepare 400 documents, a tenth of them held out, as folder/dataset."""
    from megatron_ettin.cli.main import main

    draw = random.Random(0)
    lines = [json.dumps({"text": sentences(seed, draw.randint(1, 12)), "id": f"doc{seed}"}) for seed in range(400)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    out = folder / "dataset"
    arguments = ["--out", str(out), "--tokenizer", str(tokenizer), "--chunk-tokens", "48", "--workers", "1"]
    assert main(["prepare", str(folder / "text.jsonl"), *arguments, "--holdout", "0.1"]) == 0
    return out
