"""A run whose log cannot be written trains on, saves, and exits with the same status as otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ettin.checkpoint.directory import latest
from tests.forkserver import program
from tests.train.runs import command, read

STEPS = 4


@contextlib.contextmanager
def pipe_without_reader() -> Iterator[int]:
    """Yield the writing end of a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


@contextlib.contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "wb") as file:
        yield file.fileno()


@contextlib.contextmanager
def hung_up_terminal() -> Iterator[int]:
    """Yield the program's side of a pseudo-terminal whose other side is closed."""
    terminal, side = os.openpty()
    os.close(terminal)
    try:
        yield side
    finally:
        os.close(side)


def arguments(run: Path, corpus: Path, *more: str) -> list[str]:
    return command(run, corpus, "mlm", [f"run.steps={STEPS}", "metrics.every_steps=1", *more])


def is_whole(run: Path) -> bool:
    """Return whether the run has recorded all steps and saved its last checkpoint."""
    newest = latest(run)
    return len(read(run).metrics) == STEPS and newest is not None and newest.name == f"step_{STEPS:09d}"


@pytest.mark.parametrize(
    ("lost", "more"),
    [
        (pipe_without_reader, ["--json"]),
        pytest.param(pipe_without_reader, [], marks=pytest.mark.full),
        pytest.param(full_disk, [], marks=pytest.mark.full),
        pytest.param(hung_up_terminal, [], marks=pytest.mark.full),
    ],
)
def test_train_without_standard_output_continues_and_warns(lost, more, corpus: Path, tmp_path: Path) -> None:
    with lost() as output:
        ended = subprocess.run(
            program("ettin", *arguments(tmp_path / "run", corpus, *more)),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr
    assert is_whole(tmp_path / "run")
    assert ended.stderr.count("warning: standard output cannot be written (") == 1


@pytest.mark.parametrize("lost", [full_disk, pytest.param(pipe_without_reader, marks=pytest.mark.full)])
def test_train_without_standard_error_continues_and_warns(lost, corpus: Path, tmp_path: Path) -> None:
    """Train a phase without the phase before it, because this prints a warning on standard error."""
    with lost() as errors:
        call = program("ettin", *arguments(tmp_path / "run", corpus, "--phase", "extend"))
        ended = subprocess.run(call, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert ended.returncode == 0, ended.stdout
    assert is_whole(tmp_path / "run")
    assert ended.stdout.count("warning: standard error cannot be written (") == 1


@pytest.mark.full
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "> /dev/full 2>&1"])
def test_train_with_closed_standard_files_exits_0(redirection: str, corpus: Path, tmp_path: Path) -> None:
    """Start a real interpreter, because its start handles closed files, and its end flushes them."""
    call = " ".join([sys.executable, "-m", "megatron_ettin", *arguments(tmp_path / "run", corpus)])
    ended = subprocess.run(["bash", "-c", f"{call} {redirection}"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert is_whole(tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("lost", ["> /dev/full 2>&1", "2>&-"])
def test_train_invalid_setting_with_closed_standard_files_exits_2(lost: str, tmp_path: Path) -> None:
    call = " ".join([sys.executable, "-m", "megatron_ettin", *arguments(tmp_path / "run", tmp_path / "none")])
    assert subprocess.run(["bash", "-c", f"{call} {lost}"], capture_output=True).returncode == 2


@pytest.mark.full
def test_train_with_closed_terminal_trains_on(corpus: Path, tmp_path: Path) -> None:
    """Close the terminal once the progress bar is on it."""
    terminal, side = os.openpty()
    call = program("ettin", *command(tmp_path / "run", corpus, "mlm", ["run.steps=40"]))
    running = subprocess.Popen(call, stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"})
    os.close(side)
    received = b""
    while b"of 40" not in received:
        received += os.read(terminal, 65_536)
    os.close(terminal)
    assert running.wait() == 0
    assert len(read(tmp_path / "run").metrics) == 40


def test_json_output_to_closing_reader_has_complete_lines(corpus: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        program("ettin", *arguments(tmp_path / "run", corpus, "--json")),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["step"] == 1
    running.stdout.close()
    assert running.wait() == 0
    assert is_whole(tmp_path / "run")
