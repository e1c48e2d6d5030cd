"""Runs commands of the docs, each in a fork of a process that has everything imported: importing takes seconds.

A call brings its words, folder, environment and standard streams. With DOCS_DRY set nothing is started: see `dry.py`.
Otherwise sizes are made small (`small.py`) and the real command runs."""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

WARM = (
    *("torch", "transformers", "matplotlib.pyplot", "megatron_ettin.train.chain", "megatron_ettin.train.order"),
    *("megatron_ettin.train.evaluate", "megatron_ettin.train.inference", "megatron_ettin.convert.to_hf"),
    *("megatron_ettin.convert.from_hf", "megatron_ettin.report.page", "megatron_ettin.plan.search"),
    *("megatron_ettin.data.ingest.prepare", "megatron_ettin.bench", "megatron_ettin.doctor"),
    *("transformers.models.modernbert.modeling_modernbert", "torch.distributed.run", "tests.docs.dry"),
    "transformers.models.modernbert_decoder.modeling_modernbert_decoder",
)


def serve(path: str) -> None:
    warnings.simplefilter("ignore")
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer(connection)


def answer(connection: socket.socket) -> None:
    """Answer one call in a forked process, and exit."""
    head, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(12))
    files = array.array("i", rights[0][2])
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        text += connection.recv(1 << 16)
    call = json.loads(text)
    for number, given in enumerate(files):
        os.dup2(given, number)
    os.environ.clear()
    os.environ.update(call["env"])
    os.chdir(call["cwd"])
    status = protected(lambda: run(call["words"]))
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(bytes([status & 255]))
    os._exit(status & 255)


def protected(function: Callable[[], int | None]) -> int:
    """Call the function, flush its output and return the exit status that a process would have."""
    try:
        status = function() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    return status


def run(words: list[str]) -> int | None:
    from tests.docs import dry, small

    if os.environ.get("DOCS_DRY"):
        return dry.check(words)
    if words[0] == "ettin":
        return ettin(small.sized(words[1:]))
    if words[0] == "python":
        return script(words[1:])
    if words[0] == "torchrun":
        ranks, rest = dry.torchrun(words[1:])
        return launched(ranks, small.sized(rest))
    raise ValueError(f"{words[0]}: runs in tagged blocks only")


def ettin(words: list[str]) -> int:
    from megatron_ettin.cli.main import main

    sys.argv = ["ettin", *words]
    return main(words)


def script(words: list[str]) -> None:
    path = Path(words[0])
    sys.argv, sys.path[0] = words, str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def launched(ranks: int, words: list[str]) -> int:
    """Start one process per rank, as torchrun does, and return the worst of their statuses."""
    from tests.pool import free_port

    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(protected(lambda: ettin(words)))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255 for child in children)


if __name__ == "__main__":
    serve(sys.argv[1])
