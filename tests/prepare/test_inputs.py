"""The files of a folder that `ettin prepare` reads, those that it reports as passed over, and its choice of two
columns."""

from __future__ import annotations

import bz2
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.data.tokenizer import Tokenizer
from megatron_ettin.prepare.inputs import list_inputs
from tests.data.corpora import prepare_here
from tests.prepare.held import documents


def names(folder: Path) -> tuple[list[str], list[str]]:
    files, passed_over = list_inputs([str(folder)], "auto")
    return [file.name for file in files], [Path(url).relative_to(folder).as_posix() for url in passed_over.urls]


def write_parquet(path: Path, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_lines(path: Path, count: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"line {i} of a file"}) + "\n" for i in range(count)))
    return path


def refused(folder: Path, *formats: str) -> str:
    """Assert that the folder or file is refused, and return the message."""
    with pytest.raises(UserError) as refusal:
        list_inputs([str(folder)], *(formats or ("auto",)))
    return str(refusal.value)


def test_list_inputs_keeps_texts_and_reports_readmes_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    write_parquet(root / "data" / "part.parquet", text=["a"])
    (root / "data" / "LICENSE.txt").write_text("no content")
    (root / "README.md").write_text("# what it is")
    (root / "books").mkdir()
    (root / "books" / "emma.txt").write_text("Emma Woodhouse, handsome, clever, and rich")
    write_lines(root / "lines" / "a.jsonl")
    (root / "lines" / "readme.rst").write_text("what these lines are")
    (root / "books" / "old.csv").write_text("a,b\n")
    (root / "books" / "packed.txt.gz").write_bytes(b"\x1f\x8b")
    (root / "empty.txt").touch()
    files, passed_over = names(root)
    assert files == ["repo/books/emma.txt", "repo/data/part.parquet", "repo/lines/a.jsonl"]
    assert sorted(passed_over) == [
        "README.md",
        "books/old.csv",
        "books/packed.txt.gz",
        "data/LICENSE.txt",
        "empty.txt",
        "lines/readme.rst",
    ]


@pytest.mark.parametrize("above", [".", "sub/deeper"])
def test_list_inputs_text_in_or_above_folder_of_parquet_is_refused_naming_both(tmp_path: Path, above: str) -> None:
    """Earlier versions dropped the texts and made the dataset from the parquet file alone."""
    write_parquet(tmp_path / above / "extra.parquet", text=["a"])
    (tmp_path / "page1.md").write_text("a page of the corpus")
    message = refused(tmp_path)
    assert "extra.parquet is parquet" in message
    assert "page1.md is text" in message


def test_list_inputs_folder_of_text_and_lines_is_refused_naming_both(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    (tmp_path / "notes.txt").write_text("are these of the corpus?")
    message = refused(tmp_path)
    assert "a.jsonl is jsonl" in message
    assert "notes.txt is text" in message


def test_list_inputs_folder_of_texts_reads_its_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a page like the others")
    (tmp_path / "guide.md").write_text("a page")
    assert names(tmp_path) == ([f"{tmp_path.name}/README.md", f"{tmp_path.name}/guide.md"], [])


LINE_NAMES = {
    "a.ndjson": None,
    "a.jsonlines": None,
    "a.jl": None,
    "a.jsonl.00": None,
    "a.jsonl.gz": "gzip",
    "a.json.gz": "gzip",
    "a.JSON.GZ": "gzip",
    "a.ndjson.zst": "zstd",
    "a.json.zst": "zstd",
    "a.jsonl.zstd": "zstd",
    "a.jsonl.bz2": "bzip2",
    "a.jl.xz": "xz",
}


@pytest.mark.parametrize("name", LINE_NAMES)
def test_list_inputs_names_of_json_lines_are_known(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / name)
    named, listed = (list_inputs([str(folder)], "auto")[0] for folder in (tmp_path / name, tmp_path))
    assert [(file.format, file.compression) for file in named] == [("jsonl", LINE_NAMES[name])]
    assert [(file.format, file.compression) for file in listed] == [("jsonl", LINE_NAMES[name])]


PACKERS = {"bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_prepare_packed_lines_give_every_document_and_truncation_is_refused(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(9)]
    packed = PACKERS[suffix](b"".join(lines[:4])) + PACKERS[suffix](b"".join(lines[4:]))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed)
    assert prepare_here(path, "--out", tmp_path / "out", "--workers", 1) == 0
    assert len(documents(tmp_path / "out")) == 9
    path.write_bytes(packed[:-9])
    assert prepare_here(path, "--out", tmp_path / "cut", "--workers", 1) == 2
    assert f"a.jsonl.{suffix}: " in capsys.readouterr().err
    path.write_bytes(b"nonsense" * 9)
    assert prepare_here(path, "--out", tmp_path / "bad", "--workers", 1) == 2
    assert f"a.jsonl.{suffix}: broken " in capsys.readouterr().err


def test_list_inputs_given_format_reads_every_file_of_a_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "part-00000")
    write_lines(tmp_path / "sub" / "c4.json.gz")
    (tmp_path / "main.py").write_text("print('text')\n")
    (tmp_path / ".hidden").write_text("never")
    files, passed_over = list_inputs([str(tmp_path)], "text")
    assert [(file.name.partition("/")[2], file.format) for file in files] == [
        ("main.py", "text"),
        ("part-00000", "text"),
        ("sub/c4.json.gz", "text"),
    ]
    assert [file.compression for file in files] == [None, None, "gzip"]
    assert passed_over.urls == []


def test_list_inputs_format_jsonl_reads_every_file_but_the_readme(tmp_path: Path) -> None:
    write_lines(tmp_path / "part-00000")
    write_lines(tmp_path / "c4.json.gz")
    (tmp_path / "README.md").write_text("# about the lines")
    (tmp_path / "_SUCCESS").touch()
    files, passed_over = list_inputs([str(tmp_path)], "jsonl")
    assert [file.name.partition("/")[2] for file in files] == ["c4.json.gz", "part-00000"]
    assert [Path(url).name for url in passed_over.urls] == ["README.md", "_SUCCESS"]


def test_list_inputs_folder_mostly_of_unknown_extensions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("a little text")
    for i in range(3):
        (tmp_path / f"{i}.py").write_text("the corpus that was meant = 1\n" * 9)
    message = refused(tmp_path)
    assert "3 of 4 files" in message
    assert "3 .py" in message
    assert "--format text" in message


def test_prepare_reports_unknown_extensions_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a text of some length, longer than what is passed over")
    (tmp_path / "in" / "b.py").write_text("pass")
    (tmp_path / "in" / "c.txt").touch()
    assert prepare_here(tmp_path / "in", "--out", tmp_path / "out", "--workers", 1) == 0
    printed = capsys.readouterr().out
    assert "1 file passed over, whose extension does not say what is in them (1 .py; `--format text` reads" in printed
    assert "1 file passed over, empty: " in printed
    assert "warning" not in printed
    (tmp_path / "in" / "b.py").write_text("pass\n" * 99)
    assert prepare_here(tmp_path / "in", "--out", tmp_path / "more", "--workers", 1) == 0
    assert "warning: more bytes than were read: 1 file passed over" in capsys.readouterr().out


def test_prepare_json_lines_named_txt_are_refused_unless_format_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.txt")
    assert prepare_here(tmp_path / "a.txt", "--out", tmp_path / "out", "--workers", 1) == 2
    assert "a.txt: its first line is a JSON object" in capsys.readouterr().err
    assert prepare_here(tmp_path / "a.txt", "--out", tmp_path / "out", "--workers", 1, "--format", "text") == 0
    assert len(documents(tmp_path / "out")) == 1


def test_prepare_file_name_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/na\xe9.txt")).write_text("text")
    assert prepare_here(folder, "--out", tmp_path / "out", "--workers", 1) == 2
    assert "na\\xe9.txt: the file's name is not UTF-8; rename it" in capsys.readouterr().err
    assert not list(tmp_path.glob(".tmp-*"))


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
    token_ids = {"text": tokenizer.encode_batch(["some words"])[0], "tokens": [7, 8, 9]}
    write_parquet(tmp_path / "both.parquet", text=["some words"], input_ids=[[50281, 7, 8, 9, 50282]])
    out = tmp_path / "out"
    assert prepare_here(tmp_path / "both.parquet", "--out", out, "--workers", 1, *options) == 0
    ((_, _, ids),) = documents(out)
    assert ids == token_ids[expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "x"}\n', "its extension does not say what is in it; say so with --format"),
        ("a.csv", b"a,b\n", "its extension does not say what is in it; say so with --format"),
        ("part-00000", b'{"text": "x"}\n', "its extension does not say what is in it; say so with --format: text"),
        ("a.py", b"pass", "its extension does not say what is in it; say so with --format: text"),
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

    arguments = ["train", "--size", "17m", "run.steps=7", "--objective", "clm", "--phase", "pretrain"]
    assert main([*arguments, "batch.warmup_tokens=0", "--dry-run", "data.seq_len=64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 7
