"""Run the checks under the project's own transformers: every check of an encoder and a decoder, generation from the
other decoders. Also show that each check of `checks.py` and `generation.py` fails on a folder that breaks its
promise."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.convert.compat import checks, generation
from tests.convert.compat.cases import Case
from tests.convert.compat.exports import EXPORTS, objective_of
from tests.convert.compat.probe import EMBEDDERS, checks_of

FIRST = ("encoder", "decoder_of_encoder")
CHECKED = [
    *((name, check) for name in FIRST for check in checks_of(objective_of(name)) if check not in EMBEDDERS),
    *(
        pytest.param(name, check, marks=pytest.mark.full)
        for name in EXPORTS
        for check in generation.DECODER
        if name not in FIRST and objective_of(name) == "clm"
    ),
]


@pytest.mark.parametrize(("name", "check"), CHECKED, ids=lambda value: getattr(value, "__name__", None))
def test_export_in_installed_transformers_passes_check(exported, name, check):
    check(Case(exported(name)))


def json_edit(file, **changes):
    def damage(model):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | changes))

    return damage


def tensors_edit(change):
    """Return an edit of a folder that passes its tensors, as a dictionary, to `change` and writes them back."""

    def damage(model):
        (file,) = model.glob("*.safetensors")
        stored = load_file(file)
        change(stored)
        save_file(stored, file, metadata={"format": "pt"})

    return damage


def closing_sep(model):
    content = json.loads((model / "tokenizer.json").read_text())
    content["post_processor"]["single"].append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    (model / "tokenizer.json").write_text(json.dumps(content))


def swap_q_and_k(stored):
    for name in [name for name in stored if "q_proj" in name]:
        other = name.replace("q_proj", "k_proj")
        stored[name], stored[other] = stored[other], stored[name]


wider = json_edit("config.json", sliding_window=9)
local_base = json_edit(
    "config.json", rope_parameters={"sliding_attention": {"rope_theta": 300.0, "rope_type": "default"}}
)
on_the_right = json_edit("tokenizer_config.json", padding_side="right")
no_norm = tensors_edit(lambda stored: stored.pop("model.final_norm.weight"))
one_more = tensors_edit(lambda stored: stored.update(more=stored["model.final_norm.weight"].clone()))
scaled = tensors_edit(lambda stored: stored["head.norm.weight"].mul_(1.1))
DAMAGE = [
    (checks.config_says_what_was_exported, "decoder_of_encoder", wider),
    (checks.config_says_what_was_exported, "encoder", json_edit("config.json", eos_token_id=3)),
    (checks.every_tensor_is_loaded, "encoder", no_norm),
    (checks.every_tensor_is_loaded, "encoder", one_more),
    (checks.logits_are_ours, "encoder", scaled),
    (checks.logits_are_ours, "decoder_of_encoder", tensors_edit(swap_q_and_k)),
    (checks.base_model_is_the_same, "encoder", no_norm),
    (checks.stored_precision_is_kept, "encoder", json_edit("config.json", dtype="bfloat16")),
    (checks.saved_again_is_the_same, "encoder", scaled),
    (checks.tokenizer_gives_the_same_ids, "decoder_of_encoder", closing_sep),
    (checks.tokenizer_gives_the_same_ids, "encoder", json_edit("tokenizer_config.json", padding_side="left")),
    (checks.tokenizer_output_fits_the_model, "encoder", scaled),
    (
        checks.tokenizer_output_fits_the_model,
        "encoder",
        json_edit("tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
    ),
    (checks.nothing_is_warned_of, "encoder", one_more),
    (
        checks.code_of_the_card_runs,
        "encoder",
        lambda model: (model / "README.md").write_text("```python\nraise OSError\n```"),
    ),
    (checks.fill_mask_pipeline, "encoder", scaled),
    (generation.greedy_is_ours, "decoder_of_encoder", local_base),
    (generation.cache_gives_the_same_logits, "decoder_of_encoder", wider),
    (generation.padded_batch_is_each_alone, "decoder_of_encoder", wider),
    (generation.tokenizer_pads_on_the_left, "decoder_of_encoder", on_the_right),
    (generation.text_generation_pipeline, "decoder_of_encoder", local_base),
    (generation.generation_ends_with_sep, "decoder_of_encoder", json_edit("generation_config.json", eos_token_id=4)),
    (generation.local_base_is_ignored_by_transformers_4, "decoder_of_encoder", local_base),
]


@pytest.mark.parametrize(("check", "name", "damage"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_compat_check_of_damaged_export_fails(exported, tmp_path, check, name, damage):
    folder = tmp_path / name
    shutil.copytree(exported(name), folder)
    damage(folder / "model")
    with pytest.raises((AssertionError, OSError)):  # the model card's code raises OSError
        check(Case(folder))


def test_compat_damage_table_covers_every_check():
    alike = {generation.beams_and_cache_agree}  # this check compares a model with itself, so no folder breaks it
    every = {*checks_of("mlm"), *checks_of("clm")} - {*EMBEDDERS} - alike
    assert {check for check, _, _ in DAMAGE} == every
