"""Jobs in SLURM's queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.launch.queue import covers
from tests.launch.cluster import Cluster
from tests.launch.jobs import ETTIN, PATH


def test_status_of_unknown_job_or_run_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    for what, expected in (
        ("999999", "SLURM does not know it"),
        ("nothing", "no such folder"),
        (tmp_path, "no run in it"),
    ):
        done = slurm.call(ETTIN, "status", what, PATH=PATH)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "no squeue answers" in slurm.call(ETTIN, "status", PATH=str(Path(ETTIN).parent)).stderr


@pytest.mark.parametrize(
    ("job", "task", "is_covered"),
    [
        ("7", "7", True),
        ("7_[2-5%1]", "7_3", True),
        ("7_2-5,9%2", "7_9", True),
        ("7_3", "7_4", False),
        ("7", None, False),
    ],
)
def test_covers_array_job_matches_its_tasks(job: str, task: str | None, is_covered: bool) -> None:
    assert covers(job, task) is is_covered
