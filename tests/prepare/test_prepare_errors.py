"""Every mistake is one line on standard error, exit status 2, and leaves nothing behind."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.data.corpora import prepare_here

GOOD = b'{"text": "a good line"}\n'


def write(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [str(folder / name)]

    return make


def empty_directory(folder: Path) -> list[str]:
    (folder / "nothing").mkdir()
    return [str(folder / "nothing")]


def absent(folder: Path) -> list[str]:
    return [str(folder / "absent.txt")]


good = write("good.jsonl", GOOD)
CASES = {
    "missing": (absent, [], "absent.txt: no such file or directory"),
    "empty": (write("empty.txt", b""), [], "empty.txt: the file is empty"),
    "nul": (write("a.txt", b"abc\x00def"), [], "a.txt: not text, a NUL byte at offset 3"),
    "not utf-8": (write("a.txt", b"ab\xff"), [], "a.txt: not UTF-8, byte 0xff at offset 2"),
    "not utf-8 in a line": (write("a.jsonl", GOOD + b'"\xe9"'), [], "a.jsonl:2: not UTF-8, byte 0xe9 at offset 25"),
    "invalid json": (write("a.jsonl", GOOD + b"\n{oops\n"), [], "a.jsonl:3: invalid JSON"),
    "cut-off json": (write("a.jsonl", GOOD + GOOD[:-4]), [], "a.jsonl:2: invalid JSON"),
    "no text key": (
        write("a.jsonl", b'{"body": "x", "id": 1}\n'),
        [],
        "a.jsonl:1: no key 'text'; keys found: body, id",
    ),
    "text is no string": (write("a.jsonl", b'{"text": 5}\n'), [], "a.jsonl:1: 'text' is of type int, not a string"),
    "no object": (write("a.jsonl", b"[1]\n"), [], "a.jsonl:1: a JSON list, not an object"),
    "other text key": (good, ["--text-key", "body"], "good.jsonl:1: no key 'body'; keys found: text"),
    "format": (
        good,
        ["--format", "jsnl"],
        "--format: 'jsnl' does not exist (did you mean 'jsonl'?); it is one of auto, text",
    ),
    "no documents": (empty_directory, [], "no input documents in"),
    "only blank lines": (write("a.jsonl", b"\n\n"), [], "no input documents left in"),
    "only empty texts": (write("a.jsonl", b'{"text": ""}\n'), [], "every text is empty"),
    "all held out": (good, ["--holdout", "0.999999999"], "all 1 are held out"),
    "chunk tokens": (good, ["--chunk-tokens", "15"], "--chunk-tokens: 15; at least 16"),
    "min chunk tokens": (good, ["--min-chunk-tokens", "1023"], "--min-chunk-tokens: 1023; allowed: 0 to 1022"),
    "holdout": (good, ["--holdout", "1.5"], "--holdout: 1.5"),
    "workers": (good, ["--workers", "0"], "--workers: 0; at least 1"),
    "seq len": (good, ["--seq-len", "512"], "--seq-len: rows of 512 tokens cannot hold chunks of --chunk-tokens 1024"),
    "seq len text": (good, ["--seq-len", "1k"], "--seq-len: '1k'"),
    "tokenizer": (good, ["--tokenizer", "./absent"], "tokenizer ./absent: no such file or directory"),
    "broken gzip": (write("a.jsonl.gz", b"nonsense, not gzip"), [], "a.jsonl.gz: broken gzip data"),
    "truncated gzip": (
        write("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9]),
        [],
        "a.jsonl.gz: gzip data ends in the middle",
    ),
    "broken zstd": (write("a.jsonl.zst", b"nonsense, not zstd"), [], "a.jsonl.zst: broken zstd data"),
    "truncated zstd": (write("a.jsonl.zst", zstandard.compress(GOOD * 99)[:-3]), [], "zstd data ends in the middle"),
    "unknown compressed": (write("a.tar.gz", b"x"), [], "a.tar.gz: compressed, not .jsonl.gz"),
}


@pytest.mark.parametrize("case", CASES)
def test_prepare_invalid_input_or_option_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, message = CASES[case]
    inputs = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    workers = [] if "--workers" in options else ["--workers", "1"]
    capsys.readouterr()
    assert prepare_here(*inputs, "--out", tmp_path / "out", *workers, *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("ettin prepare: ")
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    assert sorted(tmp_path.rglob("*")) == before


def test_prepare_process_with_invalid_input_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    (path,) = CASES["broken gzip"][0](tmp_path)
    command = [sys.executable, "-m", "megatron_ettin", "prepare", path, "--out", tmp_path / "out", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ettin prepare: {path}: broken gzip data")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_prepare_unwritable_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert prepare_here(*good(tmp_path), "--out", tmp_path / "file" / "out", "--workers", 1) == 2
    assert "cannot write" in capsys.readouterr().err
