"""Damaged or hostile runs and datasets of others: tables and comparisons still work, and no control sequence reaches a
terminal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from megatron_ettin.base.text import printable
from megatron_ettin.cli.main import main
from megatron_ettin.runs.directory import find_runs
from tests.pool import Pool
from tests.train.runs import command, read, train

SHAPE = ["model.num_layers=2", "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def run(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps of an encoder. Tests copy the run before use."""
    return train(pool, 1, tmp_path_factory.mktemp("runs") / "run", corpus, "mlm", [*SHAPE, "run.steps=2"]).directory


HARMS = {
    "latest": b"\xff\xfe",
    "latest of 5,000 characters": b"a" * 5_000,
    "config.yaml": b"\xff",
    "metrics.jsonl": b'{"step": "x", "tokens": [1], "loss": "x", "slowest_rank": 1, "tokens_per_second": NaN}\n',
    "slurm/events.jsonl": b'{"event": "submitted", "runs": 5}\n\xff\n{"event": ["started"]}\n',
}


@pytest.mark.ranks
def test_status_with_damaged_runs_shows_all_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (name, content) in enumerate(HARMS.items()):
        harmed = shutil.copytree(run, tmp_path / "runs" / f"{number}")
        path = harmed / ("checkpoints/latest" if name.startswith("latest") else name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    shutil.copytree(run, tmp_path / "runs" / "whole")
    assert main(["status", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(HARMS) + 1
    assert "step 2" in lines[-1]
    assert main(["status", str(tmp_path / "runs"), "--json"]) == 0


@pytest.mark.ranks
def test_status_with_unreadable_folder_shows_other_runs(run: Path) -> None:
    """List the readable run and warn of the private folder, as another user in a fork."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user wants root")
    # imports happen before the fork, because the other user may not be able to read the modules
    main(["status", str(run)])
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    shutil.copytree(run, folder / "mine")
    (folder / "private").mkdir(mode=0o700)
    folder.chmod(0o777)
    output, child = folder / "said", os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            with open(output, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                status = main(["status", str(folder)])
                out.write(f"{[path.name for path in find_runs(folder)]}\n")
            os._exit(status)
        finally:
            os._exit(99)
    status, lines = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text().splitlines()
    shutil.rmtree(folder)
    assert status == 0
    assert len(lines) == 4
    assert lines[0] == f"warning: {folder}/private/config.yaml: Permission denied; skipped"
    assert "step 2" in lines[1]
    assert lines[2] == lines[0]
    assert lines[3] == "['mine']"


@pytest.mark.ranks
def test_resume_and_compare_with_torn_lines_pass(
    pool: Pool, corpus: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = shutil.copytree(run, tmp_path / "torn")
    with open(torn / "history.jsonl", "ab") as history:
        history.write(b'{"time": "2026-01-0\n')
    first, second = (torn / "metrics.jsonl").read_bytes().splitlines()
    (torn / "metrics.jsonl").write_bytes(first + b'\n{"step": nu\n' + second + b"\n")
    assert main(["compare", str(torn), str(run), "--out", str(tmp_path / "page.html")]) in (0, 1)
    output = capsys.readouterr()
    assert "line 2 cannot be read" in output.out + (tmp_path / "page.html").read_text()
    assert "metrics.jsonl:2: not a JSON object with a step; left out" in output.err
    result = pool.run(1, command(torn, corpus, "mlm", [*SHAPE, "run.steps=3"]))[0]
    assert result.status == 0, result.output[-2000:]
    assert "metrics.jsonl:2: not a JSON object with a step; moved to metrics.damaged.jsonl" in result.output
    assert read(torn).column("step") == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\r\nstep 9", r"a\r\nstep 9"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202eevil", r"\u202eevil"),
        ("\U000e0001evil", r"\U000e0001evil"),
        ("é 数", "é 数"),
        ("\udc80", r"\udc80"),
    ],
)
def test_printable_escapes_control_sequences(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_order_and_samples_show_escape_sequences_in_ids(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the reader reads a small model and the decoder. " * 20
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "\x1b[2J\x1b]0;x\x07\r\nfake", "text": text}) + "\n")
    options = ["--tokenizer", str(corpus / "tokenizer"), "--chunk-tokens", "64", "--seq-len", "64", "--workers", "1"]
    assert main(["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "data"), *options]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "data"), "--sample", "2"]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert r"\x1b[2J\x1b]0;x\x07\r\nfake" in output


def test_mixture_of_hostile_yaml_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ", ".join(f"&a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))
    bomb = f"datasets: [[&a0 [x,x,x,x,x,x,x,x,x], {levels}]]"
    for content in (bomb, "datasets: " + "[" * 5_000, "- path: 2024-13-45", "- {path: a, weight: [[1]]}", "- [[a]]"):
        (tmp_path / "mixture.yaml").write_text(content)
        assert main(command(tmp_path / "run", tmp_path / "mixture.yaml", "mlm", ["run.steps=1"])) == 2
        output = capsys.readouterr().err
        assert output.count("\n") == 1
        assert len(output) < 500
        assert "mixture" in output


def test_index_that_points_outside_of_its_tokens_is_named(corpus: Path, tmp_path: Path) -> None:
    from megatron_ettin.base.errors import UserError
    from megatron_ettin.data.dataset import open_dataset
    from megatron_ettin.data.indexed import HEADER

    folder = shutil.copytree(corpus, tmp_path / "dataset", ignore=shutil.ignore_patterns("heldout"))
    path = folder / "shard_00000.idx"
    raw, chunks = bytearray(path.read_bytes()), open_dataset(folder).num_chunks
    # a negative length, and an offset far beyond the end
    raw[HEADER.size : HEADER.size + 4] = (-5).to_bytes(4, "little", signed=True)
    offset = HEADER.size + 4 * chunks + 8
    raw[offset : offset + 8] = (10**12).to_bytes(8, "little")
    path.write_bytes(raw)
    dataset = open_dataset(folder)
    for chunk in (0, 1):
        with pytest.raises(UserError, match=r"shard_00000\.idx: damaged: chunk"):
            dataset.chunk(chunk)
