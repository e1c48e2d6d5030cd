"""`--init-from` weights of another recipe: shape, windows, epsilon and rotary bases are inherited from them."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_ettin.checkpoint.directory import read_config
from megatron_ettin.config.resolve import Start, inherited, parse, to_yaml
from megatron_ettin.convert.from_hf import from_hf
from tests.convert.folders import make_folder
from tests.train.runs import TINY

pytestmark = pytest.mark.ranks
# every override of the tiny shape that is not a model setting
ARGUMENTS = [word for word in TINY if not word.startswith("model.")]


def start(pool, run, corpus, *arguments, world=1, phase="pretrain", size="17m", status=0):
    line = ["train", "--size", size, "--objective", "mlm", "--phase", phase, "--run-dir", str(run), *ARGUMENTS]
    results = pool.run(world, [*line, f"data.mixture={corpus}", *map(str, arguments)])
    assert {result.status for result in results} == {status}, results[0].output[-2000:]
    return results[0].output


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    room = tmp_path_factory.mktemp("imported")
    from_hf(make_folder(room / "theirs", "mlm"), room / "weights")
    return room / "weights"


def test_init_from_imported_weights_inherits_model_settings(pool, corpus, imported, tmp_path):
    run, theirs = tmp_path / "run", read_config(imported)["model"]
    output = start(pool, run, corpus, "--init-from", imported, "run.steps=2", "checkpoint.every_steps=1")
    assert "model.local_rope_theta=500.0 comes with the weights (the recipe has 10000.0)" in output
    assert "model.encoder_window=8 comes with the weights (the recipe has 64)" in output
    model = read_config(run)["model"]
    different = {key for key, value in theirs.items() if model[key] != value}
    # max_position_embeddings follows data.seq_len
    assert different == {"max_position_embeddings"}
    # a resume does not need the imported weights
    shutil.move(imported, tmp_path / "elsewhere")
    try:
        start(pool, run, corpus, "--init-from", imported, "run.steps=3")
        start(pool, run, corpus, "run.steps=4")
    finally:
        shutil.move(tmp_path / "elsewhere", imported)
    launches = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [launch["step"] for launch in launches] == [0, 2, 3]
    assert launches[0]["init_from"] == str(imported)
    assert "init_from" not in launches[1]
    # the next phase keeps rotary bases that differ from the recipe's
    start(pool, tmp_path / "decay", corpus, "--init-from", run, "run.steps=1", phase="decay", world=2)
    assert read_config(tmp_path / "decay")["model"]["local_rope_theta"] == 500.0


def test_init_from_overrides_win_over_inherited_settings(pool, corpus, imported, tmp_path):
    arguments = ("--init-from", imported, "run.steps=1", "model.local_rope_theta=700", "model.encoder_window=4")
    output = start(pool, tmp_path / "run", corpus, *arguments)
    assert "local_rope_theta" not in output
    assert "encoder_window" not in output
    assert "global_rope_theta=20000.0" in output
    model = read_config(tmp_path / "run")["model"]
    assert (model["local_rope_theta"], model["encoder_window"], model["num_layers"]) == (700.0, 4, 4)


def groups(size, phase, *arguments):
    import yaml

    return yaml.safe_load(to_yaml(parse(size, "clm", phase, overrides=arguments)))


def test_inherited_recipe_settings_do_not_override_next_phase():
    kept = inherited(groups("17m", "pretrain"))
    assert not {"local_rope_theta", "global_rope_theta", "num_layers"} & set(kept)
    config = parse("17m", "clm", "extend", start=Start(kept))
    assert config == parse("17m", "clm", "extend")
    assert config.model.global_rope_theta != parse("17m", "clm", "pretrain").model.global_rope_theta


def test_inherited_settings_of_another_published_size_are_ignored():
    kept = inherited(groups("32m", "pretrain"))
    assert parse("17m", "clm", "extend", start=Start(kept)) == parse("17m", "clm", "extend")


def test_inherited_decoder_window_keys_65_are_kept():
    kept = inherited(groups("17m", "pretrain", "model.decoder_window_keys=65"))
    assert parse("17m", "clm", "decay", start=Start(kept)).model.decoder_window_keys == 65
