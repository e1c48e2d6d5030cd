"""Which files of a folder `ettin prepare` reads, which it reports as passed over, and which of two columns it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ettin.data.ingest.inputs import list_inputs
from megatron_ettin.data.tokenizer import Tokenizer
from tests.data.corpora import prepare_here
from tests.data.held import documents


def names(folder: Path) -> tuple[list[str], list[str]]:
    files, passed_over = list_inputs([str(folder)], "auto")
    return [file.name for file in files], [Path(url).relative_to(folder).as_posix() for url in passed_over]


def write_parquet(path: Path, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_list_inputs_keeps_texts_and_reports_readmes_passed_over(tmp_path: Path) -> None:
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
def test_prepare_key_options_choose_between_text_and_tokens(
    tmp_path: Path, options: tuple[str, ...], expected: str, tokenizer: Tokenizer
) -> None:
    found = {"text": tokenizer.encode_batch(["some words"])[0], "tokens": [7, 8, 9]}
    write_parquet(tmp_path / "both.parquet", text=["some words"], input_ids=[[50281, 7, 8, 9, 50282]])
    out = tmp_path / "out"
    assert prepare_here(tmp_path / "both.parquet", "--out", out, "--workers", 1, *options) == 0
    ((_, _, ids),) = documents(out)
    assert ids == found[expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "x"}\n', "its extension does not say what is in it; say so with --format"),
        ("a.csv", b"a,b\n", "its extension does not say what is in it; say so with --format"),
        ("a.jsonl.zstd", b"x", "its extension does not say what is in it; say so with --format"),
        ("a.bin", b"\x00\x01", "a pair, name.bin and name.idx; the .idx is not there"),
    ],
)
def test_prepare_file_of_unknown_format_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert prepare_here(tmp_path / name, "--out", tmp_path / "out", "--workers", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert message in line


def test_prepare_output_url_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert prepare_here(tmp_path / "a.txt", "--out", "s3://bucket/x", "--workers", 1) == 2
    assert "is a URL; datasets are made in a local directory" in capsys.readouterr().err


def test_train_overrides_between_options_are_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_ettin.cli.main import main

    words = ["train", "--size", "17m", "run.steps=7", "--objective", "clm", "--phase", "pretrain"]
    assert main([*words, "batch.warmup_tokens=0", "--dry-run", "data.seq_len=64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 7
