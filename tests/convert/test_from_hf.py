"""Folders that cannot be imported: exit status 2, one line that names the file or tensor, nothing written."""

from __future__ import annotations

import json
import shutil

import torch

from tests.convert.folders import edit_config, refused, rewrite


def test_from_hf_other_architecture_is_refused(theirs, tmp_path, capsys):
    edit_config(theirs, architectures=["BertForMaskedLM"], model_type="bert")
    refused(capsys, tmp_path, "from-hf", theirs, "BertForMaskedLM")


def test_from_hf_vocab_size_mismatch_is_refused(theirs, tmp_path, capsys):
    edit_config(theirs, vocab_size=400)
    refused(capsys, tmp_path, "from-hf", theirs, "the vocabulary of config.json asks for (400, 64)")


def test_from_hf_tokenizer_too_large_or_unreadable_is_refused(sources, theirs, tmp_path, capsys, tiny_tokenizer):
    shutil.copytree(tiny_tokenizer, theirs, dirs_exist_ok=True)
    record = json.loads((theirs / "tokenizer.json").read_text())
    record["added_tokens"].append(record["added_tokens"][0] | {"id": 320, "content": "[EXTRA]"})
    (theirs / "tokenizer.json").write_text(json.dumps(record))
    refused(capsys, tmp_path, "from-hf", theirs, "the tokenizer has 321 ids")
    (theirs / "tokenizer.json").write_text("{")
    refused(capsys, tmp_path, "from-hf", theirs, "tokenizer.json: unreadable")


def test_from_hf_tensor_shape_mismatch_is_refused(theirs, tmp_path, capsys):
    edit_config(theirs, intermediate_size=128)
    refused(capsys, tmp_path, "from-hf", theirs, "mlp.Wi.weight is (192, 64), but config.json asks for (256, 64)")


def test_from_hf_missing_or_unknown_tensor_is_named(theirs, tmp_path, capsys):
    rewrite(theirs, lambda held: held.pop("head.norm.weight"))
    refused(capsys, tmp_path, "from-hf", theirs, "lacks head.norm.weight")
    rewrite(theirs, lambda held: held.update({"head.norm.weight": torch.ones(64), "classifier.weight": torch.ones(2)}))
    refused(capsys, tmp_path, "from-hf", theirs, "holds classifier.weight")


def test_from_hf_untied_output_weight_is_refused(theirs, tmp_path, capsys):
    rewrite(theirs, lambda held: held.update({"decoder.weight": torch.ones(320, 64)}))
    refused(capsys, tmp_path, "from-hf", theirs, "decoder.weight differs from the embedding")


def test_from_hf_integer_weights_are_refused(theirs, tmp_path, capsys):
    rewrite(theirs, lambda held: held.update({"head.norm.weight": torch.ones(64, dtype=torch.int32)}))
    refused(capsys, tmp_path, "from-hf", theirs, "head.norm.weight is I32")
