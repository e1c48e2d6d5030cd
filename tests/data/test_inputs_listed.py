"""What `ettin prepare` takes of a directory, what it passes over and says so, and which column where there are two."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ettin.data.ingest.inputs import list_inputs
from tests.data.corpora import prepare_here
from tests.data.held import documents


def names(folder: Path) -> tuple[list[str], list[str]]:
    files, passed_over = list_inputs([str(folder)], "auto")
    return [file.name for file in files], [Path(url).relative_to(folder).as_posix() for url in passed_over]


def write_parquet(path: Path, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_readmes_are_told_and_books_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    write_parquet(root / "data" / "part.parquet", text=["a"])
    (root / "data" / "LICENSE.txt").write_text("no content")
    (root / "README.md").write_text("# what it is")
    (root / "books").mkdir()
    (root / "books" / "emma.txt").write_text("Emma Woodhouse, handsome, clever, and rich")
    (root / "books" / "lines.jsonl").write_text('{"text": "b"}\n')
    (root / "books" / "old.csv").write_text("a,b\n")
    (root / "books" / "packed.txt.gz").write_bytes(b"\x1f\x8b")
    (root / "empty.txt").touch()
    files, passed_over = names(root)
    assert files == ["repo/books/emma.txt", "repo/books/lines.jsonl", "repo/data/part.parquet"]
    assert sorted(passed_over) == [
        "README.md",
        "books/old.csv",
        "books/packed.txt.gz",
        "data/LICENSE.txt",
        "empty.txt",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "text"),
        (("--tokens-key", "input_ids"), "tokens"),
        (("--tokens-key", "input_ids", "--text-key", "text"), "text"),
        (("--text-key", "absent"), "tokens"),
    ],
)
def test_text_or_tokens(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    write_parquet(tmp_path / "both.parquet", text=["some words"], input_ids=[[50281, 7, 8, 9, 50282]])
    out = tmp_path / "out"
    assert prepare_here(tmp_path / "both.parquet", "--out", out, "--workers", 1, *options) == 0
    ((_, _, ids),) = documents(out)
    assert (ids == [7, 8, 9]) == (expected == "tokens")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "x"}\n', "its extension does not say what is in it; say so with --format"),
        ("a.csv", b"a,b\n", "its extension does not say what is in it; say so with --format"),
        ("a.jsonl.zstd", b"x", "its extension does not say what is in it; say so with --format"),
        ("a.bin", b"\x00\x01", "a pair, name.bin and name.idx; the .idx is not there"),
    ],
)
def test_files_that_are_no_texts(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert prepare_here(tmp_path / name, "--out", tmp_path / "out", "--workers", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and message in line


def test_a_url_is_no_place_for_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert prepare_here(tmp_path / "a.txt", "--out", "s3://bucket/x", "--workers", 1) == 2
    assert "is a URL; datasets are made in a local directory" in capsys.readouterr().err


def test_words_may_stand_between_options(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_ettin.cli.main import main

    words = ["train", "--size", "17m", "run.steps=7", "--objective", "clm", "--phase", "pretrain"]
    assert main([*words, "batch.warmup_tokens=0", "--dry-run", "data.seq_len=64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 7
