"""Run `ettin prepare` on small inputs that still make several tasks: here, in a fork, or as a process to be killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_ettin.cli.main import main
from megatron_ettin.prepare import engine, inputs
from tests import forkserver
from tests.data.corpora import WORDS, words

TASK_BYTES = 100_000
HOLD_VARIABLE = "ETTIN_TEST_HOLD"


def write_inputs(root: Path) -> Path:
    """Write a directory of three small files, twelve archives, and a tokenizer of their words, which loads quickly."""
    (root / "texts").mkdir()
    for i in range(3):
        (root / "texts" / f"{i}.txt").write_text(words(3_000, i))
    rows = [json.dumps({"text": words(180, i)}) for i in range(3_000)]
    part = len(rows) // 12
    for i in range(12):
        content = "\n".join(rows[i * part : (i + 1) * part]).encode()
        (root / f"part{i}.jsonl.gz").write_bytes(gzip.compress(content, 1, mtime=0))
    write_tokenizer(root / "tokenizer")
    return root


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with one id for each of WORDS."""
    vocabulary = {text: i for i, text in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *WORDS])}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def arguments_for(large: Path, out: Path, workers: int) -> list[str]:
    parts = sorted(map(str, large.glob("*.gz")))
    settings = ["--out", str(out), "--chunk-tokens", "64", "--holdout", "0.05", "--seq-len", "64"]
    tokenizer = ["--tokenizer", str(large / "tokenizer")]
    return [str(large / "texts"), *parts, *settings, *tokenizer, "--workers", str(workers)]


def prepare_small_tasks(*arguments: str) -> int:
    """Run the command with tasks of at most 100 kB, so that small inputs make several shards."""
    with mock.patch.object(inputs, "TASK_BYTES", TASK_BYTES):
        return main(["prepare", *arguments])


def forked(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start the command in a fork of a process that has imported everything.

    To kill the command while it works, use `start`, because a signal reaches a fork through its client only."""
    command = forkserver.command("tests.prepare.small_tasks:prepare_small_tasks", *arguments)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


# worker processes run the script too, up to its last line
SCRIPT = """
import sys
from tests.prepare.small_tasks import hold_tasks, prepare_small_tasks
hold_tasks()
if __name__ == "__main__":
    sys.exit(prepare_small_tasks(*sys.argv[1:]))
"""


def hold_tasks() -> None:
    """Block every task from the number in HOLD_VARIABLE on, so that a test can stop the command while it works."""
    first = os.environ.get(HOLD_VARIABLE)
    if first is None:
        return
    real = engine.run_task

    def run_task(task: inputs.Task, *more: Any) -> int:
        while task.index >= int(first):
            time.sleep(0.05)
        return real(task, *more)

    engine.run_task = run_task


def killed_before_publishing(*arguments: str) -> None:
    """Run the command, and kill this process with SIGKILL when the dataset is staged but not yet renamed."""
    from megatron_ettin.prepare import run

    run.plan_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    prepare_small_tasks(*arguments)


def start(
    arguments: list[str], script: Path, sigint: Any = signal.SIG_DFL, **environment: str
) -> subprocess.Popen[str]:
    """Start the command as a script in a new session, so that its whole process group can be killed.

    `sigint` is the SIGINT handler that the command inherits. It is set because the tests may be a background job of a
    shell, which ignores SIGINT."""
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(forkserver.ROOT), *sys.path]), **environment}
    command = [sys.executable, str(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, sigint))  # fmt: skip


def without_progress(errors: str) -> list[str]:
    """Return the lines of standard error without progress lines, which only slow machines print."""
    return [line for line in errors.splitlines() if line and not line.startswith("prepare: ")]


def finish(running: subprocess.Popen[str]) -> str:
    """Wait for a command, assert that it succeeds, and return its standard output."""
    output, errors = running.communicate(timeout=180)
    assert running.returncode == 0, errors
    return output


def fails(running: subprocess.Popen[str]) -> str:
    """Wait for a command, assert that it exits with status 2 and one line of error, and return that line."""
    _, errors = running.communicate(timeout=180)
    assert running.returncode == 2, errors
    (line,) = without_progress(errors)
    return line


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
