"""`checkpoint.staging`: one folder for several runs, full disks, and what killed processes leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ettin.checkpoint.directory import list_checkpoints
from megatron_ettin.checkpoint.integrity import verify
from megatron_ettin.checkpoint.reader import CheckpointReader
from megatron_ettin.checkpoint.writer import remove_leftovers, staging_folder
from megatron_ettin.cli.main import main
from tests import forkserver
from tests.pool import Pool, mutated
from tests.train.runs import command, train

pytestmark = pytest.mark.ranks
SHAPE = ["model.num_layers=2", "run.steps=1", "checkpoint.every_steps=1"]
WAIT_SECONDS = 120.0


def train_and_copy_together(own: str, other: str, *overrides: str) -> int:
    """Run `ettin`; its first copy from staging waits until the other run has staged a file too."""
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path, **named: bool) -> Path:
        if Path(source).suffix == ".distcp" and not Path(own).exists():
            Path(own).touch()
            deadline = time.monotonic() + WAIT_SECONDS
            while not Path(other).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        return copyfile(source, target, **named)

    with mock.patch.object(shutil, "copyfile", copy), mutated(None):
        return main(list(overrides))


def test_staging_shared_by_two_runs_keeps_their_weights_apart(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Both runs of a pair have staged their files of one step before either copies them."""
    shared = tmp_path / "own-disk"
    processes = []
    for own, other in (("mlm", "clm"), ("clm", "mlm")):
        overrides = command(tmp_path / own, corpus, own, [*SHAPE, f"checkpoint.staging={shared}"])
        marks = (str(tmp_path / f"{own}.staged"), str(tmp_path / f"{other}.staged"))
        line = forkserver.command("tests.checkpoint.test_writer:train_and_copy_together", *marks, *overrides)
        processes.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for process in processes:
        output = process.communicate()[1]
        assert process.returncode == 0, output[-2000:]
    for objective in ("mlm", "clm"):
        train(pool, 1, tmp_path / f"{objective}-alone", corpus, objective, SHAPE)
        ours, theirs = (list_checkpoints(tmp_path / name)[-1] for name in (objective, f"{objective}-alone"))
        verify(ours)
        first, second = CheckpointReader(ours), CheckpointReader(theirs)
        assert list(first.keys()) == list(second.keys())
        assert all(torch.equal(first.read(key), second.read(key)) for key in second.keys())  # noqa: SIM118
    assert list(shared.iterdir()) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that has room for names but for no data."""
    if os.geteuid() != 0:
        pytest.skip("mounting wants root")
    folder = tmp_path / "own-disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    (folder / "filler").write_bytes(b"\0" * ((32 << 20) - (64 << 10)))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_staging_on_full_disk_is_named_and_used_again_once_there_is_room(
    pool: Pool, corpus: Path, tmp_path: Path, full_disk: Path
) -> None:
    overrides = ["model.num_layers=2", "run.steps=10", "checkpoint.every_steps=2", "checkpoint.retry_seconds=0.01"]
    overrides += [f"checkpoint.staging={full_disk}", "checkpoint.asynchronous=false"]
    results = pool.run(1, command(tmp_path / "run", corpus, "mlm", overrides), "room_after_step_8")
    output = results[0].output
    assert results[0].status == 0, output[-2000:]
    assert f"step_000000002 could not be saved (rank 0: {full_disk}/" in output
    assert "ENOSPC, No space left on device" in output
    assert list_checkpoints(tmp_path / "run")[-1].name == "step_000000010"
    assert list(full_disk.iterdir()) == []


def test_staging_copy_that_differs_is_refused(tmp_path: Path, pool: Pool, corpus: Path) -> None:
    """The copy is compared with the staged file, so a disk that changes a byte is reported."""
    overrides = ["model.num_layers=2", "run.steps=1", f"checkpoint.staging={tmp_path / 'own-disk'}"]
    results = pool.run(1, command(tmp_path / "run", corpus, "mlm", overrides), "copies_change_a_byte")
    assert results[0].status == 1
    assert "the copy is not what was written to" in results[0].output
    assert list_checkpoints(tmp_path / "run") == []


LEAVES = """
import os, signal, sys
from pathlib import Path
from megatron_ettin.checkpoint.writer import staging_folder
with staging_folder(Path(sys.argv[1]), "a run") as folder:
    (folder / "__0_0.distcp").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_staging_leftovers_of_killed_processes_go_and_all_else_stays(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path)], cwd=forkserver.ROOT)
    assert done.returncode == -signal.SIGKILL
    (tmp_path / "ettin-datasets").mkdir()
    (tmp_path / ".ettin-staging-of-mine").mkdir()
    kept = {tmp_path / "ettin-datasets", tmp_path / ".ettin-staging-of-mine"}
    assert len(set(tmp_path.iterdir()) - kept) == 1
    with staging_folder(tmp_path, "run") as live:
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == kept | {live}
    assert set(tmp_path.iterdir()) == kept
