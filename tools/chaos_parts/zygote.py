"""A process that has imported everything and has no threads; each rank is forked from it.

So a launch of four ranks imports nothing. `Zygote` is the tool's handle; run as a script, this file is the process.
Requests and answers are JSON lines on its standard input and output. It is the parent of every rank, and ranks end
when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("megatron_ettin.cli.train", "megatron_ettin.train.job", "megatron_ettin.train.trainer", "tests.pool")
CLONE_NEWNET = 0x40000000
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class Zygote:
    """Handle of the process that forks ranks. `environment` is set from the process's start on (for LD_PRELOAD)."""

    def __init__(self, **environment: str) -> None:
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        env = {**os.environ, **ONE_THREAD, "PYTHONPATH": path, **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.changed = threading.Condition()
        self.forked: list[int] = []
        self.ended: dict[int, int] = {}
        self.ready = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            with self.changed:
                if "ready" in answer:
                    self.ready = True
                elif "status" in answer:
                    self.ended[answer["pid"]] = answer["status"]
                else:
                    self.forked.append(answer["pid"])
                    # process ids are reused
                    self.ended.pop(answer["pid"], None)
                self.changed.notify_all()

    def fork(self, request: dict[str, Any]) -> int:
        """Start a rank (`be_rank`) and return its process id."""
        assert self.process.stdin is not None
        with self.changed:
            if not self.changed.wait_for(lambda: self.ready, 300):
                raise RuntimeError("the process that ranks are forked from did not start")
            before = len(self.forked)
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            if not self.changed.wait_for(lambda: len(self.forked) > before, 60):
                raise RuntimeError("no rank was forked")
            return self.forked[-1]

    def status(self, pid: int) -> int | None:
        """Return a rank's exit status, negative for a signal, None while it runs. RuntimeError if it is unknown."""
        with self.changed:
            status = self.ended.get(pid)
        if status is None and self.process.poll() is not None:
            raise RuntimeError("the process that ranks are forked from is gone")
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve() -> None:
    warnings.simplefilter("ignore")
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    from megatron_ettin.platform import detect

    detect("cpu")
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"
    answer(ready=True)
    running: set[int] = set()
    incomplete = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            block = os.read(0, 1 << 16)
            if not block:
                return
            *lines, incomplete = (incomplete + block).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    be_rank(json.loads(line))
                running.add(pid)
                answer(pid=pid)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            running.discard(pid)
            answer(pid=pid, status=os.waitstatus_to_exitcode(status))


def answer(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def be_rank(request: dict[str, Any]) -> None:
    """Run `ettin ...` as one rank.

    `namespace`: the name of its network; `clock`: a file with the seconds that its clock is to be wrong by;
    `save_marker`: as in `wait_before_save`.
    """
    status = 1
    try:
        os.setsid()
        out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, file in ((0, null), (1, out), (2, out)):
            os.dup2(file, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
        os.environ.update(request["environment"])
        if request.get("namespace"):
            enter_network(request["namespace"])
        if request.get("clock"):
            shift_clock(Path(request["clock"]))
        if request.get("save_marker"):
            wait_before_save(Path(request["save_marker"]))
        from megatron_ettin.cli.main import main
        from tests.pool import mutated

        with mutated(request.get("mutation")):
            status = main(request["command"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)


def enter_network(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if libc.setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"network namespace {name}")
    os.close(handle)


def shift_clock(file: Path) -> None:
    """Shift this process's wall clock by the seconds in `file` at each reading; steady clocks stay right."""
    true = time.time

    def shifted() -> float:
        with contextlib.suppress(OSError, ValueError):
            return true() + float(file.read_text())
        return true()

    time.time = shifted


def wait_before_save(marker: Path) -> None:
    """Once, before a checkpoint is written, create `marker` and wait for another file next to it."""
    from megatron_ettin.checkpoint import directory

    first = directory.new_staging

    def waiting(*args: Any) -> Path:
        directory.new_staging = first
        marker.touch()
        while not marker.with_suffix(".go").exists():
            time.sleep(0.01)
        return first(*args)

    directory.new_staging = waiting  # type: ignore[assignment]


if __name__ == "__main__":
    serve()
