"""Run one function in several forks at the same time, for tests of files that processes share."""

from __future__ import annotations

import subprocess
import sys

from megatron_ettin.data import packing_index
from megatron_ettin.data.blended_dataset import open_blended_dataset
from megatron_ettin.data.dataset import open_dataset
from megatron_ettin.data.local_copy import open_local_copy
from megatron_ettin.data.mixture import MixtureEntry
from tests import forkserver


def at_once(target: str, *arguments: object, processes: int = 4) -> list[str]:
    """Call `module:function` in this many processes and return their outputs. The function must call `meet` first."""
    command, pipe = forkserver.command(target, *arguments), subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(processes)]
    met = []
    for one in running:
        assert one.stdout is not None
        met.append(one.stdout.readline())
    for one in running:
        assert one.stdin is not None
        one.stdin.close()
    outputs = []
    for one, first in zip(running, met, strict=True):
        one.stdin = None
        output, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors
        outputs.append(first + output)
    return outputs


def meet() -> None:
    """Wait until every process has called this."""
    print("ready", flush=True)
    sys.stdin.read()


def build_rows(folder: str) -> None:
    """Open a packing index, and print `built` if this process had to build it."""
    real = packing_index.build_packing_index

    def build(*arguments: object) -> None:
        print("built")
        real(*arguments)  # type: ignore[arg-type]

    packing_index.build_packing_index = build  # type: ignore[assignment]
    dataset = open_dataset(folder)
    meet()
    packing_index.PackingIndex.build_or_open(dataset, 300)


def copy_locally(folder: str, local: str) -> None:
    """Open the local copy of a dataset; it prints a line if it has to be made."""
    corpus = open_blended_dataset([MixtureEntry(folder)], 256, "packed", 3, "pretrain")
    meet()
    open_local_copy(corpus, local).datasets[0].verify()
