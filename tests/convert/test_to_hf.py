"""Sources and arguments of conversions that are refused with exit status 2."""

from __future__ import annotations

from tests.convert.folders import command, refused


def test_convert_source_missing_or_no_checkpoint_is_refused(tmp_path, capsys):
    refused(capsys, tmp_path, "from-hf", tmp_path / "nowhere", "no such folder")
    refused(capsys, tmp_path, "to-hf", tmp_path / "nowhere", "no such folder")
    refused(capsys, tmp_path, "to-hf", tmp_path, "neither a checkpoint")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    refused(capsys, tmp_path, "to-hf", tmp_path / "run", "the run has no checkpoint yet")


def test_convert_bad_arguments_exit_2_and_write_nothing(sources, tmp_path, capsys):
    checkpoint = sources / "checkpoint"
    for arguments in ([], ["to-hf"], ["to-hf", checkpoint, tmp_path / "out", "--dtype", "float8"]):
        assert command(capsys, *arguments)[0] == 2
    for count in ("0", "many"):
        assert command(capsys, "to-hf", checkpoint, tmp_path / "out", "--max-shard-bytes", count)[0] == 2
    assert list(tmp_path.iterdir()) == []
