"""Every mistake ends in exit status 2, one line that names the file or tensor, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from megatron_ettin.checkpoint.directory import seal_and_rename
from megatron_ettin.checkpoint.integrity import seal
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.checkpoint.weights_writer import write_weights
from megatron_ettin.convert.from_hf import from_hf
from megatron_ettin.convert.to_hf import ExportOptions, to_hf
from tests.convert.folders import command, make_folder, same_bits, tensors


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of theirs in shards and the checkpoint imported from it; copied before each harm."""
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


def refused(capsys, tmp_path, way, source, said):
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = command(capsys, way, source, tmp_path / "out")
    assert status == 2
    assert out == ""
    assert err.startswith("ettin convert: ")
    assert said in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """Change one tensor, or the names, of the folder's first shard."""
    file = sorted(folder.glob("*.safetensors"))[0]
    held = tensors(folder)
    for other in folder.glob("*.safetensors"):
        other.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return file


def test_from_hf_other_architecture_is_refused(theirs, tmp_path, capsys):
    edit_config(theirs, architectures=["BertForMaskedLM"], model_type="bert")
    refused(capsys, tmp_path, "from-hf", theirs, "BertForMaskedLM")


def test_from_hf_missing_shard_is_named(theirs, tmp_path, capsys):
    name = sorted(theirs.glob("model-*.safetensors"))[1]
    name.unlink()
    refused(capsys, tmp_path, "from-hf", theirs, f"{name.name}: missing")


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, -1])
def test_from_hf_truncated_shard_is_named(theirs, tmp_path, capsys, keep_bytes):
    file = sorted(theirs.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep_bytes])
    refused(capsys, tmp_path, "from-hf", theirs, f"{file.name}: truncated")


def test_from_hf_shard_header_longer_than_file_is_refused(theirs, tmp_path, capsys):
    file = sorted(theirs.glob("model-*.safetensors"))[0]
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    refused(capsys, tmp_path, "from-hf", theirs, f"{file.name}: truncated")


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


def test_from_hf_wrong_shard_index_is_refused(theirs, tmp_path, capsys):
    path = theirs / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embeddings.norm.weight"] = files[-1]
    path.write_text(json.dumps(index))
    refused(capsys, tmp_path, "from-hf", theirs, f"{files[-1]}: lacks model.embeddings.norm.weight")
    index["weight_map"]["model.embeddings.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    refused(capsys, tmp_path, "from-hf", theirs, "leads out of its folder")
    path.write_text("[")
    refused(capsys, tmp_path, "from-hf", theirs, "index.json: unreadable")


def test_from_hf_untied_output_weight_is_refused(theirs, tmp_path, capsys):
    rewrite(theirs, lambda held: held.update({"decoder.weight": torch.ones(320, 64)}))
    refused(capsys, tmp_path, "from-hf", theirs, "decoder.weight differs from the embedding")


def test_from_hf_integer_weights_are_refused(theirs, tmp_path, capsys):
    rewrite(theirs, lambda held: held.update({"head.norm.weight": torch.ones(64, dtype=torch.int32)}))
    refused(capsys, tmp_path, "from-hf", theirs, "head.norm.weight is I32")


def test_from_hf_pickled_weights_are_refused(theirs, tmp_path, capsys):
    for file in theirs.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, theirs / "pytorch_model.bin")
    refused(capsys, tmp_path, "from-hf", theirs, "pytorch_model.bin is a pickle")


def test_convert_source_missing_or_no_checkpoint_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "from-hf", tmp_path / "nowhere", "no such folder")
    refused(capsys, tmp_path, "to-hf", tmp_path / "nowhere", "no such folder")
    refused(capsys, tmp_path, "to-hf", tmp_path, "neither a checkpoint")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    refused(capsys, tmp_path, "to-hf", tmp_path / "run", "the run has no checkpoint yet")


def test_convert_output_not_empty_is_refused_and_kept(sources, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for way, source in (("to-hf", sources / "checkpoint"), ("from-hf", sources / "theirs")):
        refused(capsys, tmp_path, way, source, "not empty")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_convert_empty_output_folder_is_used(sources, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert command(capsys, "to-hf", sources / "checkpoint", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "config.json").is_file()
    (tmp_path / "back").mkdir()
    assert command(capsys, "from-hf", tmp_path / "out", tmp_path / "back")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "config.yaml", "progress.json"])
def test_to_hf_damaged_checkpoint_file_is_named(checkpoint, tmp_path, capsys, name):
    file = checkpoint / name
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    file.write_bytes(flipped)
    refused(capsys, tmp_path, "to-hf", checkpoint, f"{name}: sha256")
    file.write_bytes(whole[:-1])
    refused(capsys, tmp_path, "to-hf", checkpoint, f"{name}: {len(whole) - 1:,} bytes")
    file.unlink()
    refused(capsys, tmp_path, "to-hf", checkpoint, f"{name}: missing")


def test_to_hf_checkpoint_unlike_its_config_is_refused(checkpoint, tmp_path, capsys):
    path = checkpoint / "config.yaml"
    text = path.read_text()
    for old, new, said in (
        ("ffn_hidden_size: 96", "ffn_hidden_size: 48", "linear_fc1.weight is (192, 64)"),
        ("num_layers: 4", "num_layers: 5", "no tensor transformer.layers.4."),
        ("vocab_size: 320", "vocab_size: 321", "embedding.word_embeddings.weight is (320, 64)"),
        ("objective: mlm", "objective: sft", "run.objective is 'sft'"),
        ("  hidden_size: 64\n", "", "hidden_size"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        seal(checkpoint)
        refused(capsys, tmp_path, "to-hf", checkpoint, said)


def test_to_hf_padded_vocabulary_is_stripped(sources, tmp_path):
    """Tensor parallelism of degree 3 rounds 320 rows up to 321; what the padding holds must not travel."""
    reader = CheckpointReader(sources / "checkpoint")
    padded = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118
    for key in ("embedding.word_embeddings.weight", "output_layer.bias"):
        padded[key] = torch.cat([padded[key], torch.full_like(padded[key][:1], 1e9)])
    staging = tmp_path / "staging"
    write_weights(staging, padded.items(), {"progress": {}})
    for name in ("config.yaml", "progress.json"):
        shutil.copy(sources / "checkpoint" / name, staging)
    seal_and_rename(staging, tmp_path / "padded")
    to_hf(tmp_path / "padded", tmp_path / "out", ExportOptions(verify=True))
    assert same_bits(tensors(sources / "whole"), tensors(tmp_path / "out"))


def test_convert_bad_arguments_exit_2_and_write_nothing(sources, tmp_path, capsys):
    checkpoint = sources / "checkpoint"
    for words in ([], ["to-hf"], ["to-hf", checkpoint, tmp_path / "out", "--dtype", "float8"]):
        assert command(capsys, *words)[0] == 2
    for count in ("0", "many"):
        assert command(capsys, "to-hf", checkpoint, tmp_path / "out", "--max-shard-bytes", count)[0] == 2
    assert list(tmp_path.iterdir()) == []
