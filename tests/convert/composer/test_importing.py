"""Sources of an imported file's model configuration (--config, the file's record, a published size), and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml

from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.config.tables import SIZES
from megatron_ettin.convert.composer import from_composer
from tests.convert.composer.trainer_files import CONFIG, composer_state, reference, refused, trainer_file, trainer_names
from tests.convert.folders import command


def run_yaml(path, name="flex_bert", top=None, **changes):
    content = {"model": {"name": name, "model_config": CONFIG | changes}, **(top or {})}
    path.write_text(yaml.safe_dump(content))
    return path


def without(key):
    return {name: value for name, value in CONFIG.items() if name != key}


def imported(tmp_path, **options):
    result = from_composer(tmp_path / "file.pt", tmp_path / "out", **options)
    return result, read_config(tmp_path / "out")


def test_from_composer_run_yaml_gives_model_config(tmp_path):
    """Read the published notation: 1e-5 is a text in YAML 1.1, and an unset local base means the global one."""
    trainer_file(tmp_path / "file.pt", "clm", config=None)
    text = yaml.safe_dump(
        {"max_seq_len": 7999, "model": {"name": "flex_gpt", "model_config": without("local_attn_rotary_emb_base")}}
    )
    (tmp_path / "run.yaml").write_text(text.replace("1.0e-05", "1e-5").replace("20000.0", "160000.0"))
    result, config = imported(tmp_path, config=tmp_path / "run.yaml")
    model = config["model"]
    assert model["global_rope_theta"] == model["local_rope_theta"] == 160_000
    assert model["norm_eps"] == 1e-5
    assert model["max_position_embeddings"] == 7_999
    assert model["decoder_window_keys"] == 9
    assert any("has no local_attn_rotary_emb_base: local layers have the global" in note for note in result["notes"])
    assert result["objective"] == "clm" == config["run"]["objective"]


def test_from_composer_transformers_config_json_gives_model_config(tmp_path):
    model = trainer_file(tmp_path / "file.pt", "clm", config=None)
    model.config.sliding_window = 8  # as a released folder has it
    model.config.save_pretrained(tmp_path / "hf")
    result, config = imported(tmp_path, config=tmp_path / "hf" / "config.json")
    assert result["objective"] == "clm"
    assert config["model"]["decoder_window_keys"] == 9
    assert config["model"]["local_rope_theta"] == 500
    assert config["model"]["encoder_window"] == 8


def test_from_composer_given_config_overrides_record_with_note(tmp_path):
    trainer_file(tmp_path / "file.pt", "mlm")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"rotary_emb_base": 10_000.0}))
    result, config = imported(tmp_path, config=tmp_path / "run.yaml")
    assert config["model"]["global_rope_theta"] == 10_000
    assert any("gives global_rope_theta 10000.0, the file records 20000.0" in note for note in result["notes"])


def test_from_composer_missing_key_takes_trainers_default_and_note(tmp_path):
    trainer_file(tmp_path / "file.pt", "mlm", config=without("rotary_emb_base"))
    result, config = imported(tmp_path)
    assert config["model"]["global_rope_theta"] == 10_000
    assert any("has no rotary_emb_base: assumed 10000.0, the original trainer's default" in n for n in result["notes"])


def test_from_composer_no_window_makes_all_layers_global(tmp_path):
    changes = {"sliding_window": -1, "global_attn_every_n_layers": -1, "local_attn_rotary_emb_base": -1}
    trainer_file(tmp_path / "file.pt", "mlm", config=CONFIG | changes)
    assert imported(tmp_path)[1]["model"]["global_attention_every"] == 1


def small_17m():
    """Return the shape of 17m with a small vocabulary, since published shapes are recognised by layers and widths."""
    shape = dataclasses.asdict(SIZES["17m"])
    names = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size"}
    return {"vocab_size": 320, "pad_token_id": 3, **{names.get(key, key): value for key, value in shape.items()}}


def test_from_composer_without_record_assumes_published_size(tmp_path, capsys):
    trainer_file(tmp_path / "file.pt", "mlm", small_17m(), config=None)
    status, out, _ = command(capsys, "from-composer", tmp_path / "file.pt", tmp_path / "out")
    assert status == 0
    assert ": mlm, 17m, 47 tensors" in out
    assert "assumed size 17m (4 heads" in out
    assert "import again with --config" in out
    assert "objective mlm: from the name head.*" in out
    model = read_config(tmp_path / "out")["model"]
    assert model["global_rope_theta"] == 160_000
    assert model["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("head", "name", "trained"), [("lm_head", "flex_gpt_to_bert", "mlm"), ("head", "flex_bert_to_gpt", "clm")]
)
def test_from_composer_cross_trained_head_takes_trained_objective(tmp_path, head, name, trained):
    first = {"head": "mlm", "lm_head": "clm"}[head]
    trainer_file(tmp_path / "file.pt", first, config=None)
    result, config = imported(tmp_path, config=run_yaml(tmp_path / "run.yaml", name))
    assert result["objective"] == trained
    assert config["run"]["objective"] == trained
    assert any("masked next-token prediction" in note for note in result["notes"]) == (trained == "mlm")


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_from_composer_objective_option_overrides_record(tmp_path, objective):
    other = {"mlm": "clm", "clm": "mlm"}[objective]
    trainer_file(tmp_path / "file.pt", objective)
    result, config = imported(tmp_path, objective=other)
    assert result["objective"] == other
    assert config["run"]["objective"] == other
    assert any(f"trained as {objective}, imported as {other}" in note for note in result["notes"])


def test_from_composer_contradicting_objective_is_refused(tmp_path, capsys):
    file, path = tmp_path / "file.pt", tmp_path / "run.yaml"
    trainer_file(file, "mlm")
    refused(capsys, tmp_path, file, "it is one of mlm, clm", "--objective", "both")
    run_yaml(path, "flex_gpt")
    refused(capsys, tmp_path, file, "has head.*, but", "--config", path)
    run_yaml(path, "flex_bert", causal_mask=True)
    refused(capsys, tmp_path, file, "causal_mask is True, but flex_bert is mlm", "--config", path)
    run_yaml(path, None, causal_mask=True)
    refused(capsys, tmp_path, file, "whose head is lm_head.*", "--config", path)
    assert command(capsys, "from-composer", file, tmp_path / "out", "--config", path, "--objective", "clm")[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; our model has it as 'gelu' only"),
        ({"normalization": "rmsnorm"}, "normalization is 'rmsnorm'"),
        ({"attention_layer": "rope_parallel"}, "attention_layer is 'rope_parallel'"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved is True"),
        ({"rotary_emb_dim": 8}, "rotary_emb_dim is 8"),
        ({"num_hidden_layers": 22}, "has 4 layers, but"),
        ({"num_hidden_layers": 10**12}, "has 4 layers, but"),
        ({"hidden_size": 128, "rotary_emb_dim": None}, "tok_embeddings.weight' is (320, 64)"),
        ({"intermediate_size": 128}, "mlp.Wi.weight' is (192, 64)"),
        ({"vocab_size": 321}, "asks for (328, 64)"),
        ({"num_attention_heads": 5, "rotary_emb_dim": None}, "5 heads do not divide hidden_size 64"),
        ({"num_attention_heads": "many"}, "invalid literal"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"global_attn_every_n_layers": -1}, "has no global layer"),
        ({"rotary_emb_base": float("nan")}, "rotary_emb_base is nan"),
    ],
)
def test_from_composer_unsupported_config_is_refused(tmp_path, capsys, changes, message):
    trainer_file(tmp_path / "file.pt", "mlm", config=CONFIG | changes)
    refused(capsys, tmp_path, tmp_path / "file.pt", message)


def test_from_composer_missing_key_with_unsupported_default_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "file.pt", "mlm", config=without("head_pred_act"))
    refused(capsys, tmp_path, tmp_path / "file.pt", "head_pred_act is 'silu' (not given: the trainer's default)")


def test_from_composer_malformed_or_missing_config_file_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "file.pt", "mlm")
    for text, message in (
        ("a: [", "not valid YAML"),
        ("model: {name: x}", "no model.model_config"),
        ("- 1", "mapping"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        refused(capsys, tmp_path, tmp_path / "file.pt", message, "--config", tmp_path / "run.yaml")
    refused(capsys, tmp_path, tmp_path / "file.pt", "No such file", "--config", tmp_path / "missing.yaml")
    trainer_file(tmp_path / "file.pt", "mlm", config=None)
    refused(capsys, tmp_path, tmp_path / "file.pt", "is no published size")


def test_from_composer_unsupported_tensors_are_refused(tmp_path, capsys):
    named = trainer_names(reference("mlm"), "mlm")
    weight = named["model.bert.final_norm.weight"]

    def with_changes(message, **changes):
        held = {**named, **changes}
        held = {name: tensor for name, tensor in held.items() if tensor is not None}
        torch.save(composer_state(held, "mlm"), tmp_path / "file.pt")
        refused(capsys, tmp_path, tmp_path / "file.pt", message)

    with_changes(
        "'model.bert.final_norm.bias', which our model does not have", **{"model.bert.final_norm.bias": weight}
    )
    with_changes("lacks model.final_norm.weight", **{"model.bert.final_norm.weight": None})
    with_changes("both head.*", **{"model.lm_head.norm.weight": weight})
    with_changes("are the same tensor of our model", **{"bert.final_norm.weight": weight})
    with_changes("is DoubleStorage; allowed", **{"model.bert.final_norm.weight": weight.double()})
    with_changes("differs from the embedding", **{"model.decoder.weight": named["model.decoder.weight"] + 1})
    with_changes("tied to it", **{"model.decoder.weight": named["model.decoder.weight"][:-1]})
    with_changes("is no plain tensor", **{"model.bert.final_norm.weight": "text"})
    bare = {name.replace("head.", "classifier."): tensor for name, tensor in named.items()}
    torch.save(composer_state(bare, "mlm"), tmp_path / "file.pt")
    refused(capsys, tmp_path, tmp_path / "file.pt", "has no head.* or lm_head.*")


def test_from_composer_tokenizer_that_does_not_fit_is_refused(tmp_path, capsys, tiny_tokenizer):
    tree = composer_state(trainer_names(reference("mlm"), "mlm"), "mlm")
    content = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 320, "content": "[EXTRA]"})
    for recorded, message in ((content, "the tokenizer has 321 ids"), ({"version": "1.0"}, "no tokenizer that")):
        tree["state"]["integrations"]["huggingface"]["tokenizer"] = {"tokenizer.json": {"content": recorded}}
        torch.save(tree, tmp_path / "file.pt")
        refused(capsys, tmp_path, tmp_path / "file.pt", message)


def test_from_composer_output_not_empty_is_refused(tmp_path, capsys):
    trainer_file(tmp_path / "file.pt", "mlm")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(capsys, tmp_path, tmp_path / "file.pt", "not empty")
