"""Names in files from others never lead out of their folders: not by `..`, by separators, or by links."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.paths import Links, checked_name, path_in
from megatron_ettin.cli.main import main
from tests.convert.folders import make_folder
from tests.forkserver import program
from tests.train.runs import command

SHAPE = ["model.num_layers=2", "run.steps=1"]
BAD_NAMES = ["", ".", "..", "../a", "a/../b", "/a", "a//b", "a\\b", "a\0b", "a\nb", 5, None, ["a"]]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a/b"], ids=repr)
def test_file_name_leaving_its_folder_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: .*; refused"):
        path_in(tmp_path, name, "index.json")


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_nested_file_name_leaving_its_folder_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="name of a file"):
        checked_name(name, nested=True)


def test_file_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: 'aaaa.*too long; refused"):
        path_in(tmp_path, "a" * 300, "index.json")


def test_link_leaving_the_folder_is_refused_and_inner_link_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("")
    (folder / "own").write_text("")
    (folder / "out").symlink_to("../secret")
    (folder / "in").symlink_to("own")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    assert path_in(folder, "in", "index.json") == folder / "in"
    assert path_in(folder, "out", "index.json", links=Links.UNCHECKED) == folder / "out"
    for name in ("out", "up/secret"):
        with pytest.raises(UserError, match="outside of its folder"):
            path_in(folder, name, "index.json", nested=True)
    with pytest.raises(UserError, match="a link to"):
        path_in(folder, "in", "index.json", links=Links.NONE)


def outside_tokenizer(manifest: dict[str, Any], dataset: Path) -> None:
    """Name a tokenizer file that lies next to the dataset, and so next to a copy of it."""
    (dataset.parent / "own.txt").write_text("evil\n")
    record = {"bytes": 5, "sha256": hashlib.sha256(b"evil\n").hexdigest()}
    manifest["tokenizer_files"]["../../own.txt"] = record


def outside_shard(manifest: dict[str, Any], dataset: Path) -> None:
    """Name a shard of another dataset."""
    shutil.copytree(dataset, dataset.parent / "base")
    manifest["shards"][0]["name"] = "../base/shard_00000"


def outside_fingerprint(manifest: dict[str, Any], dataset: Path) -> None:
    """Set the fingerprint, which names the local copy's folder, to a path that leads elsewhere."""
    manifest["fingerprint"] = "x/../../victim"


def linked_shard(manifest: dict[str, Any], dataset: Path) -> None:
    shutil.copytree(dataset, dataset.parent / "base")
    (dataset / "shard_00000.bin").unlink()
    (dataset / "shard_00000.bin").symlink_to("../base/shard_00000.bin")


def linked_within(manifest: dict[str, Any], dataset: Path) -> None:
    os.rename(dataset / "shard_00000.bin", dataset / "tokens")
    (dataset / "shard_00000.bin").symlink_to("tokens")


def linked_tokenizer(manifest: dict[str, Any], dataset: Path) -> None:
    """Replace a tokenizer file by a link to a secret, which a checkpoint would copy."""
    manifest["tokenizer_files"].pop("special_tokens_map.json", None)
    (dataset / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    (dataset / "tokenizer" / "special_tokens_map.json").symlink_to("../../victim/keep")


HARMS = [outside_tokenizer, outside_shard, outside_fingerprint, linked_shard, linked_within, linked_tokenizer]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_train_with_local_copy_of_hostile_dataset_is_refused_and_touches_nothing(
    corpus: Path, tmp_path: Path, harm: Callable[[dict[str, Any], Path], None]
) -> None:
    dataset, victim, root = tmp_path / "dataset", tmp_path / "victim", tmp_path / "copies" / "root"
    shutil.copytree(corpus, dataset, ignore=shutil.ignore_patterns("heldout"))
    victim.mkdir()
    (victim / "keep").write_text("kept")
    manifest = json.loads((dataset / "manifest.json").read_text())
    # an attacker writes the digest too
    del manifest["content_sha256"]
    harm(manifest, dataset)
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    before = {path for path in tmp_path.rglob("*") if dataset not in path.parents}
    arguments = command(tmp_path / "run", dataset, "mlm", [*SHAPE, f"data.local_copy={root}"])
    done = subprocess.run(program("ettin", *arguments), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert str(dataset) in done.stderr
    assert (victim / "keep").read_text() == "kept"
    own = {tmp_path / "run", tmp_path / "copies", root, root / ".lock"}
    after = {
        path for path in tmp_path.rglob("*") if dataset not in path.parents and tmp_path / "run" not in path.parents
    }
    made = {path for path in after - before - own if ".tmp-dataset-" not in str(path)}
    assert made == set()


@pytest.mark.parametrize(
    "verb", [("inspect", "--verify"), ("prepare", "--out", "OUT")], ids=lambda arguments: arguments[0]
)
def test_dataset_that_names_a_shard_elsewhere_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: tuple[str, ...]
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(corpus, dataset, ignore=shutil.ignore_patterns("heldout"))
    manifest = json.loads((dataset / "manifest.json").read_text())
    del manifest["content_sha256"]
    outside_shard(manifest, dataset)
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in verb]
    assert main([arguments[0], str(dataset), *arguments[1:]]) == 2
    assert "'../base/shard_00000' leads out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prepare_split_of_a_saved_dataset_elsewhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    assert main(["prepare", str(tmp_path / "given"), "--out", str(tmp_path / "out")]) == 2
    assert "dataset_dict.json: '../secret' leads out of its folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with a tokenizer; its parent holds the Hugging Face folder that it came from."""
    room = tmp_path_factory.mktemp("folders")
    make_folder(room / "theirs", "mlm")
    shutil.copytree(corpus / "tokenizer", room / "theirs", dirs_exist_ok=True)
    assert main(["convert", "from-hf", str(room / "theirs"), str(room / "checkpoint")]) == 0
    return room / "checkpoint"


@pytest.mark.parametrize("added_type", ["link", "file"])
@pytest.mark.parametrize("verb", ["convert", "inspect"])
def test_checkpoint_with_unrecorded_file_is_refused_by_convert_and_verify(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], added_type: str, verb: str
) -> None:
    given = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "netrc").write_text("machine example password secret")
    added = given / "tokenizer" / "special_tokens_map.json"
    added.unlink(missing_ok=True)
    entries = json.loads((given / "integrity.json").read_text())
    entries["files"].pop("tokenizer/special_tokens_map.json", None)
    (given / "integrity.json").write_text(json.dumps({"format": 1, "files": entries["files"]}))
    if added_type == "link":
        added.symlink_to(tmp_path / "netrc")
    else:
        added.write_text("{}")
    arguments = ["to-hf", str(given), str(tmp_path / "out")] if verb == "convert" else [str(given), "--verify"]
    assert main([verb, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{added}: " in error
    assert not (tmp_path / "out").exists()


def test_import_of_folder_with_tokenizer_linked_elsewhere_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = shutil.copytree(checkpoint.parent / "theirs", tmp_path / "theirs")
    (tmp_path / "netrc").write_text('{"password": "secret"}')
    (given / "special_tokens_map.json").unlink(missing_ok=True)
    (given / "special_tokens_map.json").symlink_to("../netrc")
    assert main(["convert", "from-hf", str(given), str(tmp_path / "out")]) == 2
    assert "special_tokens_map.json: a link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_import_from_the_hubs_cache_follows_its_links(checkpoint: Path, tmp_path: Path) -> None:
    blobs, revision = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(checkpoint.parent / "theirs", blobs)
    revision.mkdir(parents=True)
    for path in blobs.iterdir():
        (revision / path.name).symlink_to(f"../../blobs/{path.name}")
    assert main(["convert", "from-hf", str(revision), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == (blobs / "tokenizer.json").read_bytes()
