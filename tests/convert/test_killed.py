"""kill -9 of a conversion that has written its weights: nothing has the output's name, and the same command makes it."""

from __future__ import annotations

import importlib
import os
import signal
from unittest import mock

import pytest

from tests import forkserver
from tests.convert.composer.trainer_files import trainer_file
from tests.convert.folders import command, make_folder

# command -> where a call of the function stands between the weights and the end
WAYS = {
    "from-hf": ("megatron_ettin.convert.from_hf", "place"),
    "to-hf": ("megatron_ettin.convert.to_hf", "export_tokenizer"),
    "from-composer": ("megatron_ettin.convert.composer.importing", "place"),
}


def convert_until_killed(way: str, *words: str) -> int | None:
    """Run `ettin convert`, in a process that dies of SIGKILL at that place."""
    module, name = WAYS[way]
    with mock.patch.object(
        importlib.import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    ):
        return forkserver.be_program("ettin", "convert", way, *words)


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
    words = [way, str(source), str(tmp_path / "out")]
    child = forkserver.call(forkserver.shared(), "tests.convert.test_killed:convert_until_killed", words)
    assert child.wait() == -signal.SIGKILL
    child.close()
    assert {path.name for path in tmp_path.iterdir()} == {*before, ".tmp-out"}
    assert list((tmp_path / ".tmp-out").rglob("*.safetensors" if way == "to-hf" else "*.distcp"))
    assert command(capsys, *words)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out"}
