"""The output of `ettin prepare`: links, paths that cannot be written, an output inside the input, two commands at the
same time, and a repeated command on a finished dataset."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.prepare import run as module
from tests.data.corpora import prepare_here, write_jsonl
from tests.prepare.small_tasks import HOLD_VARIABLE, arguments_for, fails, forked, start, wait_for


def written(path: Path, text: str = "some words of a text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("target_exists", [True, False])
def test_prepare_output_link_is_followed(tmp_path: Path, target_exists: bool) -> None:
    """--out may be a link to another disk. Earlier versions failed at the last rename, after all the work."""
    source = written(tmp_path / "a.txt")
    (tmp_path / "disk").mkdir()
    if target_exists:
        (tmp_path / "disk" / "corpus").mkdir()
    (tmp_path / "corpus").symlink_to(tmp_path / "disk" / "corpus")
    assert prepare_here(source, "--out", tmp_path / "corpus", "--workers", 1) == 0
    assert (tmp_path / "corpus").is_symlink()
    assert open_dataset(tmp_path / "disk" / "corpus").num_documents == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "corpus", "disk"]


@pytest.mark.parametrize("out", [".", "", "x" * 300, "loop"])
def test_prepare_output_that_cannot_be_named_is_refused_before_the_work(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "in" / "a.txt")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if out == "loop":
        (tmp_path / "empty" / out).symlink_to(out)
    before = sorted(tmp_path.rglob("*"))
    assert prepare_here(tmp_path / "in", "--out", out, "--workers", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ettin prepare: --out")
    assert sorted(tmp_path.rglob("*")) == before


def test_prepare_empty_input_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_here("", "--out", tmp_path / "out", "--workers", 1) == 2
    assert "INPUT: an empty name; the current directory is `.`" in capsys.readouterr().err


def test_prepare_output_inside_input_is_never_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.txt"):
        written(tmp_path / "in" / name, name)
    arguments = (tmp_path / "in", "--workers", 1, "--out")
    assert prepare_here(*arguments, tmp_path / "in" / "corpus") == 0
    assert open_dataset(tmp_path / "in" / "corpus").num_documents == 2
    assert prepare_here(*arguments, tmp_path / "in" / "corpus") == 0
    assert "already complete" in capsys.readouterr().out
    # earlier versions read the tokens of corpus/ and none of the texts
    assert prepare_here(*arguments, tmp_path / "other") == 2
    message = capsys.readouterr().err
    assert "a.txt is text" in message
    assert "shard_00000.bin is indexed" in message


def test_prepare_folder_of_texts_and_a_dataset_of_them_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions read both the texts and the dataset made from them: each document twice, with status 0."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"text": "a word and another " * 300}) + "\n")
    arguments = (tmp_path / "in", "--workers", 1, "--out")
    assert prepare_here(*arguments, tmp_path / "in" / "first") == 0
    capsys.readouterr()
    assert prepare_here(*arguments, tmp_path / "second") == 2
    message = capsys.readouterr().err
    assert "is indexed and" in message
    assert "a.jsonl is jsonl: which of them is the corpus?" in message
    assert not (tmp_path / "second").exists()


def test_prepare_input_that_is_the_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "in" / "a.txt")
    assert prepare_here(tmp_path / "in", "--out", tmp_path / "in", "--workers", 1) == 2
    assert "is also --out" in capsys.readouterr().err


def test_prepare_rewritten_input_of_same_size_is_not_already_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 10)
    arguments = (source, "--out", tmp_path / "out", "--workers", 1)
    assert prepare_here(*arguments) == 0
    content, modified = source.read_bytes(), source.stat().st_mtime_ns
    source.write_bytes(content.replace(b"the", b"eth"))
    os.utime(source, ns=(modified + 10**9, modified + 10**9))
    capsys.readouterr()
    assert prepare_here(*arguments) == 2
    assert f"{source} was written at another time" in capsys.readouterr().err
    assert prepare_here(*arguments, "--accept-copied") == 0
    assert "already complete: the same settings, inputs of the same names and sizes (times" in capsys.readouterr().out
    os.utime(source, ns=(modified, modified))
    assert prepare_here(*arguments) == 0
    assert "already complete: the same settings, inputs of the same names, sizes and times" in capsys.readouterr().out


def test_prepare_dataset_without_recorded_times_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Datasets of earlier versions have no inputs.json, so only names and sizes are compared."""
    source = write_jsonl(tmp_path / "a.jsonl", 10)
    arguments = (source, "--out", tmp_path / "out", "--workers", 1)
    assert prepare_here(*arguments) == 0
    (tmp_path / "out" / "inputs.json").unlink()
    assert prepare_here(*arguments) == 0
    assert "already complete: the same settings, inputs of the same names and sizes (times" in capsys.readouterr().out


def test_prepare_second_command_at_the_same_time_is_refused_at_once(large: Path, tmp_path: Path) -> None:
    arguments = arguments_for(large, tmp_path / "out", 1)
    first = start(arguments, tmp_path / "small_tasks.py", **{HOLD_VARIABLE: "1"})
    try:
        wait_for(lambda: bool(list((tmp_path / ".tmp-out" / "tasks").glob("task_*.json"))))
        assert "another `ettin prepare` is writing it" in fails(forked(arguments))
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert (tmp_path / ".tmp-out" / "prepare.json").is_file()  # the first command's work is kept, to continue it


def test_prepare_finished_by_another_command_meanwhile_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another command publishes after this one has looked at the output and before it has the lock.

    Earlier versions repeated all the work, and then failed."""
    source, run = write_jsonl(tmp_path / "a.jsonl", 10), module.Build.run
    arguments = (source, "--out", tmp_path / "out", "--workers", 1)

    def overtaken(build: module.Build) -> module.PrepareResult:
        monkeypatch.setattr(module.Build, "run", run)
        assert prepare_here(*arguments) == 0
        capsys.readouterr()
        return build.run()

    monkeypatch.setattr(module.Build, "run", overtaken)
    assert prepare_here(*arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
