"""Conversions that are killed or ended after they wrote their weights, or that run twice: no half-written folder has
the output's name, and the same command then succeeds."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from tests import forkserver
from tests.convert.composer.trainer_files import trainer_file
from tests.convert.folders import command, make_folder, refused

# command -> (module, function) of a call that the command makes after it has written the weights
WAYS = {
    "from-hf": ("megatron_ettin.convert.importing", "seal_and_rename"),
    "to-hf": ("megatron_ettin.convert.to_hf", "export_tokenizer"),
    "from-composer": ("megatron_ettin.convert.importing", "seal_and_rename"),
}


def convert_until_killed(way: str, *arguments: str) -> int | None:
    """Run `ettin convert` in this process, which kills itself with SIGKILL at the call named in WAYS."""
    module, name = WAYS[way]
    with mock.patch.object(
        importlib.import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    ):
        return forkserver.be_program("ettin", "convert", way, *arguments)


@pytest.mark.parametrize("way", WAYS)
def test_convert_killed_while_writing_leaves_nothing_and_repeats(tmp_path, capsys, way):
    source = make_folder(tmp_path / "theirs", "mlm")
    if way == "to-hf":
        source = tmp_path / "checkpoint"
        assert command(capsys, "from-hf", tmp_path / "theirs", source)[0] == 0
    if way == "from-composer":
        source = tmp_path / "file.pt"
        trainer_file(source, "mlm")
    before = {path.name for path in tmp_path.iterdir()}
    arguments = [way, str(source), str(tmp_path / "out")]
    child = forkserver.call(forkserver.shared(), "tests.convert.test_folders:convert_until_killed", arguments)
    assert child.wait() == -signal.SIGKILL
    child.close()
    assert {path.name for path in tmp_path.iterdir()} == {*before, ".tmp-out"}
    assert list((tmp_path / ".tmp-out").rglob("*.safetensors" if way == "to-hf" else "*.distcp"))
    assert command(capsys, *arguments)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out"}


def convert_slowly(way: str, source: str, out: str, signs: str) -> int | None:
    """Run `ettin convert`; at the call named in WAYS it makes `signs`/reached and waits for `signs`/go."""
    module, name = WAYS[way]
    real, folder = getattr(importlib.import_module(module), name), Path(signs)

    def wait(*given, **named):
        (folder / "reached").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
        return real(*given, **named)

    with mock.patch.object(importlib.import_module(module), name, wait):
        return forkserver.be_program("ettin", "convert", way, source, out)


@pytest.fixture
def begun(tmp_path):
    """Start `convert from-hf` in a process that has written its weights and now waits (`convert_slowly`)."""
    make_folder(tmp_path / "theirs", "mlm")
    (tmp_path / "signs").mkdir()
    code = "import sys; from tests.convert.test_folders import convert_slowly; sys.exit(convert_slowly(*sys.argv[1:]))"
    arguments = ["from-hf", tmp_path / "theirs", tmp_path / "out", tmp_path / "signs"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(forkserver.ROOT), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    end = time.monotonic() + 120
    while not (tmp_path / "signs" / "reached").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    yield child
    child.kill()
    child.communicate()


def test_convert_two_to_one_output_refuses_the_second_and_keeps_the_first(tmp_path, capsys, begun):
    """The second command used to remove the first one's files, and both failed."""
    status, _, err = command(capsys, "from-hf", tmp_path / "theirs", tmp_path / "out")
    assert status == 2
    assert "out: another process is writing it; wait for it or name another folder" in err
    (tmp_path / "signs" / "go").touch()
    assert begun.wait(timeout=60) == 0
    assert (tmp_path / "out" / "config.yaml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "signs", "theirs"]


@pytest.mark.full
def test_convert_ended_by_sigterm_leaves_nothing(tmp_path, begun):
    begun.send_signal(signal.SIGTERM)
    assert begun.wait(timeout=60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["signs", "theirs"]


@pytest.mark.parametrize("exists", [True, False])
def test_convert_output_link_is_followed(tmp_path, capsys, exists):
    make_folder(tmp_path / "theirs", "mlm")
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    assert command(capsys, "from-hf", tmp_path / "theirs", tmp_path / "out")[0] == 0
    assert (tmp_path / "disk" / "out" / "config.yaml").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


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
