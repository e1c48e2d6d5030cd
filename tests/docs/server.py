"""Run the commands of the docs, each in a fork of the test session's server (tests/forkserver.py).

With DOCS_DRY set nothing is started: see `dry.py`. Otherwise sizes are made small (`small.py`) and the real command
runs."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.forkserver import be_program, protected


def run(*call: str) -> int | None:
    """Run the program named by the first argument with the other arguments, or check the call if DOCS_DRY is set."""
    from tests.docs import dry, small

    arguments = list(call)
    if os.environ.get("DOCS_DRY"):
        return dry.check(arguments)
    if arguments[0] == "ettin":
        return be_program("ettin", *small.sized(arguments[1:]))
    if arguments[0] == "python":
        return script(arguments[1:])
    if arguments[0] == "torchrun":
        ranks, rest = dry.torchrun(arguments[1:])
        return launched(ranks, small.sized(rest))
    raise ValueError(f"{arguments[0]}: runs in tagged blocks only")


def script(arguments: list[str]) -> None:
    path = Path(arguments[0])
    sys.argv, sys.path[0] = arguments, str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def launched(ranks: int, arguments: list[str]) -> int:
    """Start one process per rank, as torchrun does, and return the worst of their statuses."""
    from tests.pool import free_port

    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(protected(lambda: be_program("ettin", *arguments)))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255 for child in children)
