"""Output of a run on a real terminal, in a log, and as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
from pathlib import Path

import pytest

from megatron_ettin.base.text import duration
from tests.forkserver import program
from tests.pool import Pool
from tests.train.runs import command, read

pytestmark = pytest.mark.ranks
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(arguments: list[str], columns: int) -> tuple[int, str]:
    """Run `ettin` on a pseudo-terminal; return (exit status, output without control sequences)."""
    line = program("ettin", *arguments)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), OMP_NUM_THREADS="1")
        os.execv(line[0], line)
    output = b""
    # reading a closed terminal raises OSError
    with contextlib.suppress(OSError):
        while block := os.read(terminal, 65_536):
            output += block
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), CONTROL.sub("", output.decode())


def test_terminal_progress_shows_step_loss_and_checkpoint(corpus: Path, tmp_path: Path) -> None:
    more = ["run.steps=3", "checkpoint.every_steps=3", "checkpoint.asynchronous=false"]
    more += [f"data.validation={corpus}/heldout", "metrics.eval_every_steps=2", "metrics.eval_rows=8"]
    arguments = command(tmp_path / "run", corpus, "mlm", more)
    status, output = on_a_terminal(arguments, 150)
    assert status == 0, output[-2000:]
    assert "165K mlm pretrain" in output
    assert "100%" in output
    assert "0s left" in output
    last = read(tmp_path / "run").metrics[-1]
    assert "step 3 of 3 · " in output
    assert f"loss {last['loss']:.4f} · lr 3.00e-03 · norm {last['grad_norm']:.3f}" in output
    assert "checkpoint: step 3" in output
    assert "step 2 validation loss " in output
    # there is no peak FLOP/s for a CPU
    assert "MFU" not in output


def test_log_without_terminal_has_one_plain_line_per_step(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    answers = pool.run(2, command(tmp_path / "run", corpus, "mlm", ["run.steps=2", "metrics.every_steps=1"]))
    lines = [line for line in answers[0].output.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert lines[1].endswith(" 0s left")
    assert "\x1b" not in answers[0].output
    assert re.fullmatch(r"step 1 tokens \d+ loss \S+ lr 3.00e-03 norm \S+ \S+ tokens/s \S.* left", lines[0])
    assert not [line for line in answers[1].output.splitlines() if line.startswith("step ")]


def test_json_output_lines_match_metrics_jsonl(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", corpus, "clm", ["run.steps=2", "metrics.every_steps=1", "--json"])
    answers = pool.run(2, arguments)
    assert [one.status for one in answers] == [0, 0], answers[0].output
    objects = [json.loads(line) for line in answers[0].output.splitlines() if line.startswith("{")]
    assert [line.pop("seconds_left") >= 0 for line in objects] == [True] * 2
    metrics = read(tmp_path / "run").metrics
    for line, recorded in zip(objects, metrics, strict=True):
        assert {key: line[key] for key in line if key != "peak_memory_bytes"}.items() <= recorded.items()


def test_duration_format_shows_two_largest_units() -> None:
    assert [duration(x) for x in (0, 40, 7_500, 273_600, 60)] == ["0s", "40s", "2h 5m", "3d 4h", "1m 0s"]


def test_terminal_shows_the_validation_loss_of_the_last_step(corpus: Path, tmp_path: Path) -> None:
    """Without an evaluation cadence, held-out data are evaluated once, at the end of the run."""
    arguments = command(tmp_path / "run", corpus, "mlm", ["run.steps=3", f"data.validation={corpus}/heldout"])
    status, output = on_a_terminal(arguments, 150)
    assert status == 0, output[-2000:]
    metrics = read(tmp_path / "run").metrics
    assert [line["step"] for line in metrics if "validation_loss" in line] == [3]
    assert f"step 3 validation loss {metrics[-1]['validation_loss']:.4f}" in output
