"""Publishing under kill -9, finding the newest good checkpoint, pruning. No torch: checkpoints are a few small
files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.base import digests
from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint import directory
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
    tidy,
)
from megatron_ettin.checkpoint.integrity import verify
from tests.checkpoint.durable import watched


def save(run, step, content="weights"):
    staging = new_staging(checkpoints_folder(run), step)
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


def test_list_checkpoints_sorts_by_step(tmp_path):
    assert step_name(7) == "step_000000007"
    steps = [3, 10, 2, 1_234_567_890, 999_999_999]
    for step in steps:
        save(tmp_path, step)
    (checkpoints_folder(tmp_path) / "step_5").mkdir()
    assert [directory.step_of(path) for path in list_checkpoints(tmp_path)] == sorted(steps)
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_publish_updates_latest_and_integrity_record(tmp_path):
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


def die_before_call(number):
    """Make this process kill itself with SIGKILL before its `number`th call from now that changes the file system."""
    calls = iter(range(1, 10_000))

    def dying(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    digests.THREADS = 1  # makes the order of the calls repeatable


def kill_everywhere(folder, step):
    """Kill the save of `step` before every call, and print what was found each time as a line of JSON.

    Each round saves step 1, starts the save of `step` in a fork that is killed, looks for the newest checkpoint, and
    saves step 3."""
    for number in itertools.count(1):
        run = folder / str(number)
        save(run, 1)
        child = os.fork()
        if child == 0:
            die_before_call(number)
            save(run, step, "new weights")
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        actual = held(latest(run, checksums=True))
        final = save(run, 3)
        left = [path.name for path in checkpoints_folder(run).glob(".tmp*")]
        print(json.dumps({"found": actual, "next": latest(run, checksums=True) == final, "left": left}))
        if not killed:
            break


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_save_killed_at_any_file_operation_leaves_whole_checkpoint(tmp_path, step):
    """There is always a complete checkpoint, the next save works, and nothing is left behind. The forks are made in a
    fresh process without threads."""
    script = f"from tests.checkpoint.test_directory import *; kill_everywhere(Path({str(tmp_path)!r}), {step})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    positions = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(positions) > 15
    assert {position["found"] for position in positions} == {"weights of 1", f"new weights of {step}"}
    assert all(position["next"] and not position["left"] for position in positions)


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_publish_fsyncs_checkpoint_before_updating_latest(tmp_path, again):
    """A power failure must leave a complete checkpoint: sync each file, then its name, then the name in `latest`."""
    with watched(tmp_path) as seen:
        save(tmp_path, 1)
        final = save(tmp_path, 1 if again else 2, "new weights")
    assert all(rename.unforced == [] for rename in seen.renames), seen.renames
    named = [rename for rename in seen.renames if rename.target.name in (step_name(1), step_name(2), "latest")]
    assert [rename.target.name for rename in named] == [step_name(1), "latest", final.name, "latest"]
    assert [rename.unnamed for rename in named if rename.target.name == "latest"] == [[], []]
    assert seen.unnamed == []


def harm_latest(run, how):
    path = checkpoints_folder(run) / "latest"
    if how == "missing":
        path.unlink()
    elif how == "unreadable":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "torn": b"step_0000",
                "binary": b"\xff\x00",
                "dangling": b"step_000000099\n",
                "long": b"step_" + b"9" * 300,
            }[how]
        )


@pytest.mark.parametrize("how", ["missing", "empty", "torn", "binary", "dangling", "long", "unreadable"])
def test_latest_damaged_or_missing_pointer_falls_back_to_newest(tmp_path, capsys, how):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    harm_latest(tmp_path, how)
    assert latest(tmp_path) == newest
    warned = capsys.readouterr().err
    if how != "missing":
        assert "latest" in warned
        assert "going on from" in warned


def test_latest_naming_older_checkpoint_is_followed_with_warning(tmp_path, capsys):
    """A kill between the last two renames leaves this state. The warning is needed, because damage can look the
    same."""
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (older.parent / "latest").write_text(older.name + "\n")
    assert latest(tmp_path) == older
    warned = capsys.readouterr().err
    assert f"names {older.name}, though there is {newer.name}" in warned


def test_tidy_removes_leftovers_and_restores_replaced_checkpoint(tmp_path):
    kept, newest = save(tmp_path, 1), save(tmp_path, 2)
    folder = newest.parent
    os.rename(newest, folder / f".tmp-replaced-{newest.name}")  # as while its step is saved again
    shutil.copytree(kept, folder / f".tmp-replaced-{kept.name}")  # as after its step was saved again
    for name in (".tmp-step_000000003", ".tmp-pruned-step_000000000"):
        (folder / name / "tokenizer").mkdir(parents=True)
    (folder / ".tmp-latest").write_text("step_00")
    tidy(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", kept.name, newest.name]
    assert latest(tmp_path, checksums=True) == newest
    tidy(tmp_path / "of a run that has not begun")


def test_latest_skips_damaged_checkpoints_and_names_their_files(tmp_path, capsys):
    good = save(tmp_path, 1)
    flipped, torn = save(tmp_path, 2), save(tmp_path, 3)
    (torn / "__0_0.distcp").write_text("weig")
    (flipped / "__0_0.distcp").write_text("Weights of 2")
    assert latest(tmp_path) == good
    warned = capsys.readouterr().err
    assert f"{torn / '__0_0.distcp'}: 4 bytes" in warned
    assert f"{flipped / '__0_0.distcp'}: sha256" in warned
    (good / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole; the newest: .*step_000000003/__0_0\.distcp"):
        latest(tmp_path)


def test_latest_flipped_bit_is_detected_only_with_checksums(tmp_path):
    good, flipped = save(tmp_path, 1), save(tmp_path, 2)
    (flipped / "__0_0.distcp").write_text("Weights of 2")
    assert latest(tmp_path) == flipped  # compares sizes only, which is cheap
    assert latest(tmp_path, checksums=True) == good


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"files": {}}',
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": 1}',
        '{"format": 1, "files": {"a": 1}}',
        '{"format": 1, "files": {"a": {"bytes": "1", "sha256": ""}}}',
        '{"format": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"/a": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"a\\nb": {"bytes": 1, "sha256": ""}}}',
    ],
)
def test_verify_malformed_or_missing_integrity_record_is_refused(tmp_path, text):
    final = save(tmp_path, 1)
    (final / "integrity.json").write_text(text)
    with pytest.raises(UserError, match=r"integrity\.json: unreadable"):
        verify(final)
    (final / "integrity.json").unlink()
    with pytest.raises(UserError, match=r"integrity\.json: missing"):
        verify(final)


def test_publish_same_step_again_replaces_checkpoint(tmp_path):
    save(tmp_path, 1)
    final = save(tmp_path, 1, "new weights")
    assert held(final) == "new weights of 1"
    assert list_checkpoints(tmp_path) == [final]


def test_publish_on_full_disk_keeps_previous_checkpoint(tmp_path, monkeypatch):
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


def test_resolve_neither_run_nor_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, output in (
        (tmp_path / "no", "no such folder"),
        (tmp_path / "file", "not a folder"),
        (tmp_path, "neither"),
    ):
        with pytest.raises(UserError, match=output):
            resolve(path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        resolve(tmp_path / "run")


def test_read_config_and_progress_malformed_files_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  hidden_size: 64\nrun:\n  size: ${oc.env:HOME}\n")
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


def test_sha256_of_abc_equals_published_value(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert digests.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
