"""Export a model that was trained with a tokenizer of other special tokens: no [PAD], no template, ids of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.data.manifest import read_manifest
from megatron_ettin.data.tokenizer import load_tokenizer
from tests.conftest import sentences
from tests.train.runs import train

pytestmark = pytest.mark.ranks
TEXT = "the reader follows the next word."


@dataclass(frozen=True)
class Exported:
    """A dataset, and the folders exported from a run on it."""

    dataset: Path
    encoder: Path
    decoder: Path
    back: Path
    """Checkpoint that was imported from the encoder's folder."""

    def config(self, objective: str) -> dict:
        folder = self.encoder if objective == "mlm" else self.decoder
        return json.loads((folder / "config.json").read_text())


def make_exports(pool, folder: Path, end_token: str) -> Exported:
    """Train for two steps on text of a Llama-like tokenizer, export as both, import the encoder again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentences(seed, 40) for seed in range(20)], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    theirs = folder / "tokenizer"
    theirs.mkdir()
    tokenizer.save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    lines = [json.dumps({"text": sentences(seed, 9)}) for seed in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    exports = Exported(folder / "dataset", folder / "encoder", folder / "decoder", folder / "back")
    arguments = ["--tokenizer", str(theirs), "--chunk-tokens", "48", "--workers", "1", "--end-token", end_token]
    assert main(["prepare", str(folder / "text.jsonl"), "--out", str(exports.dataset), *arguments]) == 0
    train(pool, 1, folder / "run", exports.dataset, "clm", ["run.steps=2", "model.max_position_embeddings=512"])
    to_hf = ["convert", "to-hf", str(folder / "run")]
    assert main([*to_hf, str(exports.decoder)]) == 0
    assert main([*to_hf, str(exports.encoder), "--objective", "mlm", "--no-verify"]) == 0
    assert main(["convert", "from-hf", str(exports.encoder), str(exports.back)]) == 0
    return exports


@pytest.fixture(scope="module")
def exported(pool, tmp_path_factory) -> Exported:
    return make_exports(pool, tmp_path_factory.mktemp("roles"), "every")


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_to_hf_config_has_the_special_ids_of_training(exported, objective):
    trained, config = read_manifest(exported.dataset).tokenizer, exported.config(objective)
    exports = [config[f"{role}_token_id"] for role in ("cls", "sep", "pad", "bos", "eos")]
    assert exports == [trained.cls_id, trained.sep_id, trained.pad_id, trained.cls_id, trained.sep_id]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_to_hf_pad_token_is_a_special_token(exported, objective):
    assert exported.config(objective)["pad_token_id"] in read_manifest(exported.dataset).tokenizer.special_ids


def test_to_hf_encoder_tokenizer_adds_cls_and_sep_as_in_training(exported):
    from transformers import AutoTokenizer

    trained, tokenizer = load_tokenizer(exported.dataset), AutoTokenizer.from_pretrained(exported.encoder)
    (bare,) = trained.encode_batch([TEXT], add_prefix_space=False)
    assert tokenizer(TEXT)["input_ids"] == [trained.cls_id, *bare, trained.sep_id]
    padded = tokenizer([TEXT, TEXT + TEXT], padding=True)["input_ids"][0]
    assert padded[len(bare) + 2 :] == [trained.pad_id] * len(bare)


def test_to_hf_decoder_tokenizer_adds_cls_as_in_training(exported):
    from transformers import AutoTokenizer

    trained, tokenizer = load_tokenizer(exported.dataset), AutoTokenizer.from_pretrained(exported.decoder)
    (bare,) = trained.encode_batch([TEXT], add_prefix_space=False)
    assert tokenizer(TEXT)["input_ids"] == [trained.cls_id, *bare]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_to_hf_max_lengths_equal_training_row_length(exported, objective):
    from transformers import AutoTokenizer

    folder = exported.encoder if objective == "mlm" else exported.decoder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert exported.config(objective)["max_position_embeddings"] == 64
    assert tokenizer.model_max_length == 64
    assert len(tokenizer(" ".join([TEXT] * 40), truncation=True)["input_ids"]) == 64


def test_from_hf_restores_training_tokenizer(exported):
    fingerprint = load_tokenizer(exported.back / "tokenizer").fingerprint
    assert fingerprint == read_manifest(exported.dataset).tokenizer.fingerprint


def test_to_hf_decoder_generation_config_has_training_ids(exported):
    ids = json.loads((exported.decoder / "generation_config.json").read_text())
    trained = read_manifest(exported.dataset).tokenizer
    assert ids["bos_token_id"] == trained.cls_id
    assert ids["eos_token_id"] == trained.sep_id
    assert ids["pad_token_id"] == trained.pad_id


@pytest.mark.full
def test_to_hf_of_chunks_without_sep_writes_no_sep(pool, tmp_path):
    from transformers import AutoTokenizer

    exports = make_exports(pool, tmp_path, "none")
    ids = AutoTokenizer.from_pretrained(exports.encoder)(TEXT)["input_ids"]
    assert ids[0] == read_manifest(exports.dataset).tokenizer.cls_id
    assert read_manifest(exports.dataset).tokenizer.sep_id not in ids
    assert load_tokenizer(exports.back / "tokenizer").fingerprint == load_tokenizer(exports.dataset).fingerprint
