"""YAML files that cannot be used are refused in one line; lines of JSON that hold no object are left out and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import read_json_lines, read_yaml


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FILE: No such file or directory"),
        (b"a: 1\nb: [\n", "FILE:3: not valid YAML (expected the node content, but found '<stream end>')"),
        (b"[" * 101, "FILE: not valid YAML (nested too deeply)"),
        (b"a: \xff", "FILE: not valid YAML ('utf-8' codec can't decode byte 0xff in position 3: invalid start byte)"),
    ],
)
def test_read_yaml_unusable_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path, "FILE")
    assert str(caught.value) == message


def test_read_yaml_numbers_with_colon_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rows: 24:32\ncount: 12\n")
    assert read_yaml(tmp_path / "a.yaml", "FILE") == {"rows": "24:32", "count": 12}


def test_read_json_lines_counts_lines_without_object_and_a_torn_last_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n[2]\nx\n{"a": 2}\n{"a": ')
    unreadable: list[int] = []
    assert list(read_json_lines(tmp_path / "a.jsonl", unreadable)) == [{"a": 1}, {"a": 2}]
    assert unreadable == [3, 4, 6]
    assert list(read_json_lines(tmp_path / "none.jsonl", unreadable)) == []
