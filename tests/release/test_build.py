"""`ettin release` from trained runs: every revision, its records and cards, and what a repeated command makes again."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as parquet
import pytest
import torch

from megatron_ettin.base.text import format_count
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.cli.main import main
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.model.init import recipe_weights
from tests.convert.folders import load, tensors
from tests.release.conftest import NAMES, PHASES, SAME, files_of, release
from tests.train.runs import read, train

pytestmark = pytest.mark.ranks


def test_release_makes_each_checkpoint_of_chain_a_revision(released, trained):
    folders = sorted(path.name for path in released.iterdir())
    assert folders == sorted([*NAMES, "main", "data_order", "release.json"])
    index = json.loads((released / "release.json").read_text())
    assert [one["revision"] for one in index["revisions"]] == NAMES
    assert index["main"] == "decay1"
    for name, phase, step in (("step5", "pretrain", 5), ("ext1", "extend", 1), ("decay1", "decay", 1)):
        reader = CheckpointReader(trained / "mlm" / phase / "checkpoints" / f"step_{step:09d}")
        stored = tensors(released / name)
        assert torch.equal(reader.read("transformer.final_layernorm.weight"), stored["model.final_norm.weight"])
        assert torch.equal(
            reader.read("embedding.word_embeddings.weight")[:320], stored["model.embeddings.tok_embeddings.weight"]
        )
        model = load(released / name, "mlm")
        assert model.config.num_hidden_layers == 4
        parity = json.loads((released / name / "parity.json").read_text())
        assert parity["tensors_identical"]
        assert parity["max_abs_logit_difference"] < 1e-4


def test_release_step_0_equals_initial_weights(released, trained):
    config = from_yaml(trained / "mlm/pretrain/config.yaml")
    wanted = recipe_weights(config.run.seed, config.model)("embedding.word_embeddings.weight", [320, 64])
    assert torch.equal(tensors(released / "step0")["model.embeddings.tok_embeddings.weight"], wanted)
    first = tensors(released / "step5")["model.embeddings.tok_embeddings.weight"]
    assert 0 < (first - wanted).abs().max() < 0.05  # five steps of training


def test_release_total_tokens_add_up_over_phases(released):
    records = {name: json.loads((released / name / "release.json").read_text()) for name in NAMES}
    totals = [records[name]["total_tokens"] for name in NAMES]
    assert totals == sorted(totals)
    assert len(set(totals)) == len(totals)
    assert records["ext1"]["total_tokens"] == records["step10"]["total_tokens"] + records["ext1"]["tokens"]


def test_release_card_of_main_lists_phases_and_no_local_paths(released, corpus):
    card = (released / "main" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit\n" in card
    assert "# tiny\n" in card
    for message in ("pretrain", "extend", "decay", "learning rate", "| dataset | 100.00% |", "training_curve.png"):
        assert message in card, message
    assert all(f"| `{name}` |" in card for name in NAMES)
    assert str(corpus.parent) not in card  # datasets by name, not by paths of this machine
    assert (released / "main" / "training_curve.png").read_bytes()[:4] == b"\x89PNG"
    again = (released / "main" / "model.safetensors").stat()
    assert again.st_ino == (released / "decay1" / "model.safetensors").stat().st_ino  # main has hard links, not copies
    for path in released.rglob("*"):
        if path.suffix in (".md", ".json"):
            assert str(corpus.parent.parent) not in path.read_text(), path


def test_release_card_of_main_gives_trained_and_planned_tokens(released, trained):
    card = (released / "main" / "README.md").read_text()
    table = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| tokens ")]
    tokens = [format_count(read(trained / "mlm" / phase).column("tokens")[-1]) for phase in PHASES]
    assert ["tokens trained", *tokens] in table
    assert ["tokens planned", "1.7T, or 10 steps", "250B, or 2 steps", "50B, or 1 steps"] in table


def test_release_card_of_revision_says_its_own_tokens(released):
    card, record = (
        (released / "ext1" / "README.md").read_text(),
        json.loads((released / "ext1/release.json").read_text()),
    )
    own, total = format_count(record["tokens"]), format_count(record["total_tokens"])
    assert f"| tokens trained | {own} in this phase, {total} in all |" in card


def test_release_data_order_equals_order_command(released, trained, capsys):
    table = parquet.read_table(released / "data_order" / "extend.parquet")
    assert set(table["dataset"].to_pylist()) == {"dataset"}
    assert max(table["step"].to_pylist()) == 2
    main(["order", str(trained / "mlm/extend"), "--steps", "1:3", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["document"] for line in lines] == table["document"].to_pylist()


def test_train_with_released_order_has_same_losses(released, trained, corpus, pool, tmp_path):
    given = f"data.order={released / 'data_order/pretrain.parquet'}"
    theirs = train(pool, 1, tmp_path / "run", corpus, "mlm", [given, f"run.steps={PHASES['pretrain'][1]}"])
    assert theirs.column("loss") == read(trained / "mlm/pretrain").column("loss")


def test_release_repeated_makes_nothing(released, trained, capfd):
    before = {path: path.stat().st_mtime_ns for path in released.rglob("*")}
    arguments = (trained / "mlm/decay", "--out", released, *SAME, "--json")
    for more in ((), ("--recheck",)):
        status, out, err = release(capfd, *arguments, *more)
        assert status == 0, err
        reported = json.loads(out)
        assert reported["made"] == []
        assert reported["kept"] == NAMES
    assert {path: path.stat().st_mtime_ns for path in before if path != released} == {
        path: time for path, time in before.items() if path != released
    }


def test_release_recheck_remakes_damaged_or_missing_revisions(released, trained, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(released, out)
    shutil.rmtree(out / "ext2")
    weights = out / "step5" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    (out / "ext1" / "config.json").write_text("{}")
    shutil.rmtree(out / "main")
    arguments = (trained / "mlm/decay", "--out", out, *SAME, "--json", "--recheck")
    status, printed, err = release(capfd, *arguments)
    assert status == 0, err
    assert sorted(json.loads(printed)["made"]) == ["ext1", "ext2", "step5"]
    assert files_of(out) == files_of(released)


def test_release_adds_later_checkpoints_and_keeps_deleted_ones(trained, tmp_path, capfd, released):
    runs = tmp_path / "runs"
    shutil.copytree(trained / "mlm/pretrain", runs / "pretrain")
    last = runs / "pretrain/checkpoints/step_000000010"
    shutil.move(last, tmp_path / "later")
    (runs / "pretrain/checkpoints/latest").write_text("step_000000005\n")
    arguments = (runs / "pretrain", "--out", tmp_path / "out", "--order", "none", "--json", *SAME)
    status, out, err = release(capfd, *arguments)
    assert status == 0, err
    assert json.loads(out)["made"] == ["step0", "step5"]
    assert json.loads((tmp_path / "out/release.json").read_text())["main"] == "step5"
    shutil.rmtree(runs / "pretrain/checkpoints/step_000000005")
    shutil.move(tmp_path / "later", last)
    status, out, err = release(capfd, *arguments)
    assert status == 0, err
    assert json.loads(out)["made"] == ["step10"]
    index = json.loads((tmp_path / "out/release.json").read_text())
    assert [one["revision"] for one in index["revisions"]] == NAMES[:3]
    assert index["main"] == "step10"
    assert files_of(tmp_path / "out/step10") == files_of(released / "step10")


def test_release_of_an_earlier_phase_leaves_main_at_the_newest_revision(trained, tmp_path, capfd, released):
    """release.json names the revision that `main` holds, also if this call's runs end before that revision."""
    out = tmp_path / "out"
    shutil.copytree(released, out)
    status, _, err = release(capfd, trained / "mlm/pretrain", "--out", out, "--order", "none", *SAME)
    assert status == 0, err
    assert json.loads((out / "main" / "release.json").read_text())["revision"] == "decay1"
    assert json.loads((out / "release.json").read_text())["main"] == "decay1"


def test_release_finds_runs_that_moved_together(trained, tmp_path, capfd):
    shutil.copytree(trained / "mlm", tmp_path / "moved", ignore=shutil.ignore_patterns("step_*5"))
    shutil.rmtree(tmp_path / "moved/extend/checkpoints/step_000000001")
    for phase in ("extend", "decay"):  # the recorded absolute paths no longer exist
        history = tmp_path / "moved" / phase / "history.jsonl"
        history.write_text(history.read_text().replace(str(trained), "/nowhere"))
    arguments = ("--out", tmp_path / "out", "--dtype", "bf16", "--order", "none", "--json")
    status, out, err = release(capfd, tmp_path / "moved/decay", *arguments)
    assert status == 0, err
    assert json.loads(out)["made"] == ["step0", "step10", "ext2", "decay1"]
    assert {tensor.dtype for tensor in tensors(tmp_path / "out/ext2").values()} == {torch.bfloat16}


def test_release_damaged_checkpoint_does_not_stop_the_others(trained, tmp_path, capfd):
    shutil.copytree(trained / "mlm/pretrain", tmp_path / "run")
    (damaged,) = (tmp_path / "run/checkpoints/step_000000005").glob("__0_0.distcp")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "run/checkpoints/step_000000010/integrity.json").unlink()
    arguments = (tmp_path / "run", trained / "mlm/extend", "--out", tmp_path / "out", "--order", "none")
    status, out, err = release(capfd, *arguments)
    assert status == 2
    assert "2 of 5 revisions failed" in err
    assert "integrity.json" in err
    assert "failed: step5" in out
    assert "__0_0.distcp" in out
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["ext1", "ext2", "main", "release.json", "step0"]
