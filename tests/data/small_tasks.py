"""`ettin prepare` on small inputs that still make several tasks, as a process of its own that can be killed."""

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

from tests.data.corpora import words


def write_inputs(root: Path) -> Path:
    """Thirteen inputs: a directory of three small files and twelve archives."""
    (root / "texts").mkdir()
    for i in range(3):
        (root / "texts" / f"{i}.txt").write_text(words(3_000, i))
    rows = [json.dumps({"text": words(180, i)}) for i in range(3_000)]
    part = len(rows) // 12
    for i in range(12):
        (root / f"part{i}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[i * part : (i + 1) * part]).encode(), 1))
    return root


def arguments_for(large: Path, out: Path, workers: int) -> list[str]:
    parts = sorted(map(str, large.glob("*.gz")))
    settings = ["--out", str(out), "--chunk-tokens", "64", "--holdout", "0.05", "--seq-len", "64"]
    return [str(large / "texts"), *parts, *settings, "--workers", str(workers)]


# A task of at most 100 kB, set where the command reads it: small inputs then make several shards.
SMALL_TASKS = (
    "import sys; from megatron_ettin.data.ingest import inputs; inputs.TASK_BYTES = 100_000;"
    "from megatron_ettin.cli.main import main;\n"
    "if __name__ == '__main__': sys.exit(main(['prepare', *sys.argv[1:]]))"
)


def start(
    arguments: list[str], script: Path, sigint: Any = signal.SIG_DFL, **environment: str
) -> subprocess.Popen[str]:
    """Start the command in a session of its own, so that its whole process group can be killed.

    `sigint` is the SIGINT handler that the command starts with. A shell's background jobs ignore SIGINT, and so would
    the command where the tests are such a job."""
    script.write_text(SMALL_TASKS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), **environment}
    command = [sys.executable, str(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, sigint))  # fmt: skip


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
