"""Fixtures: a tiny model trained by `ettin train` through three phases on three layouts, and its release."""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ettin.cli.main import main
from tests.pool import Pool
from tests.train.runs import command

# phase -> (ranks, steps, steps between checkpoints, overrides)
PHASES = {
    "pretrain": (1, 10, 5, []),
    "extend": (2, 2, 1, ["parallel.tp=2"]),
    "decay": (2, 1, 1, ["parallel.pp=2"]),
}
# in the order of training; sorted as text, step10 would come before step5
NAMES = ["step0", "step5", "step10", "ext1", "ext2", "decay1"]
# options with which a release equals the fixture `released` byte for byte
SAME = ["--licence", "mit", "--name", "tiny"]


@pytest.fixture(scope="session")
def trained(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an encoder through PHASES and return the folder of the runs, `mlm/PHASE`. Read-only."""
    root = tmp_path_factory.mktemp("trained")
    train_phases(pool, corpus, root, "mlm")
    return root


def train_phases(pool: Pool, corpus: Path, root: Path, objective: str) -> None:
    before: Path | None = None
    for phase, (world, steps, every, overrides) in PHASES.items():
        run = root / objective / phase
        options = ["--init-from", str(before)] if before else []
        overrides = ["checkpoint.keep=0", f"checkpoint.every_steps={every}", f"run.steps={steps}", *overrides]
        line = command(run, corpus, objective, overrides, options)
        line[line.index("pretrain")] = phase
        results = pool.run(world, line)
        assert {result.status for result in results} == {0}, results[0].output[-3000:]
        before = run


@pytest.fixture(scope="session")
def released(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the release of all three phases. Read-only."""
    out = tmp_path_factory.mktemp("released") / "out"
    with without_workers():
        assert main(["release", str(trained / "mlm/decay"), "--out", str(out), *SAME]) == 0
    return out


@contextlib.contextmanager
def without_workers() -> Iterator[None]:
    """Make revisions in this process instead of in worker processes, which import for seconds.

    Arguments are pickled and unpickled, as for a worker. test_faults.py uses real workers."""
    import torch

    from megatron_ettin.release import build
    from megatron_ettin.release.revision import make_revision

    def make_here(revisions: Sequence[Any], *shared: Any) -> Iterator[Any]:
        arguments = [(revision, *shared[:-1]) for revision in revisions]
        return itertools.starmap(make_revision, pickle.loads(pickle.dumps(arguments)))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker, because the figures in parity.json depend on the number of threads
    try:
        with mock.patch.object(build, "make_revisions", make_here):
            yield
    finally:
        torch.set_num_threads(threads)


def release(capfd: Any, *arguments: object) -> tuple[int, str, str]:
    """Run `ettin release` in this process and return (status, standard output, last line of standard error)."""
    capfd.readouterr()
    with without_workers():
        status = main(["release", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, (err.strip().splitlines() or [""])[-1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
