"""Publishing under kill -9, finding the newest good checkpoint, pruning. No torch: a checkpoint here is some files."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from megatron_ettin.checkpoint import directory, integrity
from megatron_ettin.checkpoint.directory import (
    checkpoints_folder,
    latest,
    list_checkpoints,
    new_staging,
    prune,
    publish,
    read_config,
    read_progress,
    resolve,
    step_name,
    verify,
)
from megatron_ettin.config.errors import UserError


def save(run, step, content="weights"):
    staging = new_staging(run, step)
    (staging / "tokenizer").mkdir()
    (staging / "tokenizer" / "tokenizer.json").write_text("{}")
    (staging / "__0_0.distcp").write_text(f"{content} of {step}")
    (staging / "metadata.json").write_text("{}")
    (staging / "empty").write_bytes(b"")
    final = checkpoints_folder(run) / step_name(step)
    publish(staging, final)
    return final


def held(checkpoint):
    return (checkpoint / "__0_0.distcp").read_text()


def test_names_sort_by_step(tmp_path):
    assert step_name(7) == "step_000000007"
    steps = [3, 10, 2, 1_234_567_890, 999_999_999]
    for step in steps:
        save(tmp_path, step)
    (checkpoints_folder(tmp_path) / "step_5").mkdir()
    assert [directory.step_of(path) for path in list_checkpoints(tmp_path)] == sorted(steps)
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_publish_and_latest(tmp_path):
    assert latest(tmp_path) is None
    for step in (1, 2):
        final = save(tmp_path, step)
        assert latest(tmp_path) == latest(tmp_path, checksums=True) == final == resolve(tmp_path) == resolve(final)
        assert (checkpoints_folder(tmp_path) / "latest").read_text() == f"{final.name}\n"
        verify(final)
    entries = json.loads((final / "integrity.json").read_text())["files"]
    assert sorted(entries) == ["__0_0.distcp", "empty", "metadata.json", "tokenizer/tokenizer.json"]
    assert entries["__0_0.distcp"]["bytes"] == len("weights of 2")
    assert directory.total_bytes(final) == sum(entry["bytes"] for entry in entries.values())
    assert sorted(path.name for path in checkpoints_folder(tmp_path).iterdir()) == [
        "latest",
        step_name(1),
        step_name(2),
    ]


KILLED = """
import os, shutil, sys
from pathlib import Path
from tests.checkpoint.test_directory import save

at, step, run = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
calls = 0

def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call

os.rename, os.replace, os.fsync = dying(os.rename), dying(os.replace), dying(os.fsync)
os.mkdir, os.unlink, os.rmdir = dying(os.mkdir), dying(os.unlink), dying(os.rmdir)
from megatron_ettin.checkpoint import integrity
integrity.THREADS = 1  # the same order of calls each time
save(run, step, "new weights")
"""


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_killed_at_every_step_of_saving(tmp_path, step):
    """kill -9 before each file-system call in turn: there is always a whole checkpoint, and the next save works."""
    outcomes = set()
    for at in range(1, 200):
        run = tmp_path / str(at)
        save(run, 1)
        done = subprocess.run([sys.executable, "-c", KILLED, str(at), str(step), str(run)], check=False)
        found = latest(run, checksums=True)
        assert found is not None
        assert held(found) in ("weights of 1", f"new weights of {step}")
        outcomes.add(held(found))
        if done.returncode == 0:
            break
        assert done.returncode == -9
        final = save(run, 3)
        assert latest(run, checksums=True) == final
        assert not [path for path in checkpoints_folder(run).iterdir() if path.name.startswith(".tmp")]
    else:
        pytest.fail("saving never came to its end")
    assert at > 15 and len(outcomes) == 2


def harm_latest(run, how):
    path = checkpoints_folder(run) / "latest"
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "torn": b"step_0000", "binary": b"\xff\x00", "dangling": b"step_000000099\n"}[how]
        )


@pytest.mark.parametrize("how", ["missing", "empty", "torn", "binary", "dangling"])
def test_harmed_latest_falls_back_and_says_so(tmp_path, caplog, how):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    harm_latest(tmp_path, how)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == newest
    if how != "missing":
        assert "latest" in caplog.text and "going on from" in caplog.text


def test_damaged_checkpoints_are_passed_over_by_name(tmp_path, caplog):
    good = save(tmp_path, 1)
    flipped, torn = save(tmp_path, 2), save(tmp_path, 3)
    (torn / "__0_0.distcp").write_text("weig")
    (flipped / "__0_0.distcp").write_text("Weights of 2")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    assert f"{torn / '__0_0.distcp'}: 4 bytes" in caplog.text
    assert f"{flipped / '__0_0.distcp'}: sha256" in caplog.text
    (good / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole; the newest: .*step_000000003/__0_0\.distcp"):
        latest(tmp_path)


def test_flipped_bit_in_the_latest_is_seen_where_asked(tmp_path):
    good, flipped = save(tmp_path, 1), save(tmp_path, 2)
    (flipped / "__0_0.distcp").write_text("Weights of 2")
    assert latest(tmp_path) == flipped  # sizes only: cheap, for showing
    assert latest(tmp_path, checksums=True) == good


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": 1}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "1", "sha256": ""}}}',
     '{"files": {"../a": {"bytes": 1, "sha256": ""}}}', '{"files": {"/a": {"bytes": 1, "sha256": ""}}}'],
)  # fmt: skip
def test_torn_integrity_record_is_refused(tmp_path, text):
    final = save(tmp_path, 1)
    (final / "integrity.json").write_text(text)
    with pytest.raises(UserError, match=r"integrity\.json: unreadable"):
        verify(final)
    (final / "integrity.json").unlink()
    with pytest.raises(UserError, match=r"integrity\.json: missing"):
        verify(final)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    final = save(tmp_path, 1, "new weights")
    assert held(final) == "new weights of 1"
    assert list_checkpoints(tmp_path) == [final]


def test_full_disk_leaves_the_previous_one(tmp_path, monkeypatch):
    good = save(tmp_path, 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert latest(tmp_path, checksums=True) == good
    save(tmp_path, 3)
    assert len(list_checkpoints(tmp_path)) == 2
    assert not list(checkpoints_folder(tmp_path).glob(".tmp*"))


def test_prune_keeps_the_newest_and_the_latest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (checkpoints_folder(tmp_path) / "latest").write_text(step_name(2) + "\n")
    assert prune(tmp_path, 0) == []
    assert [directory.step_of(path) for path in prune(tmp_path, 2)] == [1, 3]
    assert [directory.step_of(path) for path in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert prune(tmp_path, 2) == []
    assert not list(checkpoints_folder(tmp_path).glob(".tmp*"))


def test_resolve_refuses_what_is_neither(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, said in ((tmp_path / "no", "no such folder"), (tmp_path / "file", "not a folder"), (tmp_path, "neither")):
        with pytest.raises(UserError, match=said):
            resolve(path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        resolve(tmp_path / "run")


def test_config_and_progress(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {hidden_size: 64}\nrun: {size: ${oc.env:HOME}}\n")
    assert read_config(tmp_path) == {"model": {"hidden_size": 64}, "run": {"size": "${oc.env:HOME}"}}
    (tmp_path / "progress.json").write_text('{"step": 3}')
    assert read_progress(tmp_path) == {"step": 3}
    for text in ("- 1", "a: [", "\0"):
        (tmp_path / "config.yaml").write_text(text)
        (tmp_path / "progress.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml"):
            read_config(tmp_path)
        with pytest.raises(UserError, match=r"progress\.json"):
            read_progress(tmp_path)
    (tmp_path / "progress.json").write_text("[]")
    with pytest.raises(UserError, match="not an object"):
        read_progress(tmp_path)


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert integrity.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
