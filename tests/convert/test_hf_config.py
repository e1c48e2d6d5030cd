from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import ModelConfig
from megatron_ettin.convert.hf_config import from_hf_config, reader_notes, to_hf_config
from megatron_ettin.convert.tokenizer_files import PUBLISHED_IDS
from tests.convert.folders import classes

MODEL = ModelConfig(
    num_layers=7,
    hidden_size=256,
    ffn_hidden_size=384,
    num_attention_heads=4,
    global_rope_theta=160_000.0,
    local_rope_theta=10_000.0,
    max_position_embeddings=7999,
)
OLD_KEYS = ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers")
NEW_KEYS = ("rope_parameters", "layer_types")


def written(tmp_path, objective, model=MODEL, drop=(), **changes):
    config = to_hf_config(model, objective, "float32", PUBLISHED_IDS) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return path


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("drop", [(), OLD_KEYS, NEW_KEYS], ids=["both", "5.x only", "4.x only"])
def test_hf_config_with_keys_of_4x_or_5x_reads_back_the_same(tmp_path, objective, drop):
    window = {"mlm": 32, "clm": 64}[objective]
    model = dataclasses.replace(MODEL, encoder_window=window, decoder_window_keys=window, norm_eps=3e-6, init_std=0.03)
    parsed = from_hf_config(written(tmp_path, objective, model, drop))
    assert (parsed.objective, parsed.model, parsed.notes) == (objective, model, ())


def test_hf_config_of_fewer_layers_than_a_period_reads_back_the_period(tmp_path):
    model = dataclasses.replace(MODEL, num_layers=2)
    assert model.global_attention_every == 3
    assert from_hf_config(written(tmp_path, "mlm", model)).model.global_attention_every == 3


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_to_hf_config_is_read_by_installed_transformers(tmp_path, objective):
    model = dataclasses.replace(MODEL, encoder_window=32, decoder_window_keys=65, norm_eps=3e-6, init_std=0.03)
    written(tmp_path, objective, model)
    config = classes(objective)[0].from_pretrained(tmp_path)
    assert config.sliding_window == (32 if objective == "mlm" else 65)
    assert config.layer_types == ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(7)]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 160_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert (config.pad_token_id, config.eos_token_id, config.max_position_embeddings) == (50_283, 50_282, 7999)
    # too small to change the logits
    assert (config.norm_eps, config.initializer_range) == (3e-6, 0.03)
    assert config.tie_word_embeddings is True
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (256, 384, 4)


def test_hf_config_decoder_window_of_original_trainer_is_kept(tmp_path):
    path = written(tmp_path, "clm", dataclasses.replace(MODEL, decoder_window_keys=65))
    config = json.loads(path.read_text())
    assert (config["local_attention"], config["sliding_window"]) == (130, 65)
    assert from_hf_config(path).model.decoder_window_keys == 65
    without = written(tmp_path, "clm", dataclasses.replace(MODEL, decoder_window_keys=65), drop=("sliding_window",))
    assert from_hf_config(without).model.decoder_window_keys == 65


@pytest.mark.parametrize(
    ("objective", "version", "local"),
    [("mlm", "4.48.0", 1e4), ("clm", "4.56.0", 1.6e5), ("clm", "5.1.0", 1e4), ("clm", None, 1.6e5)],
)
def test_from_hf_config_missing_thetas_take_writers_defaults_and_note(tmp_path, objective, version, local):
    drop = (*OLD_KEYS[:2], "rope_parameters")
    parsed = from_hf_config(written(tmp_path, objective, drop=drop, transformers_version=version))
    assert (parsed.model.global_rope_theta, parsed.model.local_rope_theta) == (160_000, local)
    assert len(parsed.notes) == 2
    assert f"assumed {local:g}" in parsed.notes[1]


def test_from_hf_config_null_local_theta_takes_global_theta(tmp_path):
    parsed = from_hf_config(written(tmp_path, "mlm", drop=("rope_parameters",), local_rope_theta=None))
    assert parsed.model.local_rope_theta == 160_000
    assert parsed.notes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["ModernBertModel"]}, "ModernBertModel"),
        ({"architectures": None, "model_type": "bert"}, "bert"),
        ({"norm_bias": True}, "norm_bias"),
        ({"decoder_bias": False}, "decoder_bias"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"global_rope_theta": 5.0}, "rope_parameters.full_attention says 160000, global_rope_theta 5"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"local_attention": 1}, "window"),
        ({"hidden_size": "wide"}, "wide"),
    ],
)
def test_from_hf_config_unsupported_model_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=f".*{message}") as caught:
        from_hf_config(written(tmp_path, "mlm", **changes))
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
def test_from_hf_config_malformed_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        from_hf_config(tmp_path / "config.json")


def test_from_hf_config_missing_hidden_size_is_named(tmp_path):
    with pytest.raises(UserError, match="has no hidden_size"):
        from_hf_config(written(tmp_path, "mlm", drop=("hidden_size",)))


def test_reader_notes_decoder_with_local_theta_names_transformers_4():
    assert "transformers 4" in reader_notes(MODEL, "clm")[0]
    assert reader_notes(MODEL, "mlm") == []
    assert reader_notes(dataclasses.replace(MODEL, local_rope_theta=160_000.0), "clm") == []
