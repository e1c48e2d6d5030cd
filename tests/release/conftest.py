"""One tiny model trained through three phases, each on another layout, by the commands themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import Pool
from tests.train.runs import command

KEEP = ["checkpoint.keep=0", "checkpoint.every_steps=1"]
# phase -> (ranks, steps, words)
PHASES = {
    "pretrain": (1, 4, []),
    "extend": (2, 2, ["parallel.tp=2"]),
    "decay": (2, 2, ["parallel.pp=2"]),
}
NAMES = ["step0", "step1", "step2", "step3", "step4", "ext1", "ext2", "decay1", "decay2"]


@pytest.fixture(scope="session")
def trained(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/OBJECTIVE/PHASE: runs of an encoder; read only."""
    root = tmp_path_factory.mktemp("trained")
    train_phases(pool, corpus, root, "mlm")
    return root


def train_phases(pool: Pool, corpus: Path, root: Path, objective: str) -> None:
    before: Path | None = None
    for phase, (world, steps, words) in PHASES.items():
        run = root / objective / phase
        options = ["--init-from", str(before)] if before else []
        line = command(run, corpus, objective, [*KEEP, *words, f"run.steps={steps}"], options)
        line[line.index("pretrain")] = phase
        results = pool.run(world, line)
        assert {result.status for result in results} == {0}, results[0].output[-3000:]
        before = run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
