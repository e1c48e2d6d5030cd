"""Rendezvous of ranks that come late or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_ettin.parallel.env import read_distributed_env
from tests import forkserver
from tests.pool import free_port


@pytest.fixture(scope="module")
def server() -> Path:
    """Return the socket of the session's fork server once it answers, so that no test waits for its imports."""
    path = forkserver.shared()
    forkserver.connect(path).close()
    return path


def join_and_sum(late_seconds: float, timeout_seconds: float, arrival_seconds: float) -> None:
    """Join the process group late and all-reduce a one."""
    import torch
    import torch.distributed as dist

    from megatron_ettin.parallel.process_groups import init_process_group
    from megatron_ettin.platform import detect

    time.sleep(late_seconds)
    init_process_group(read_distributed_env(), detect("cpu"), timeout_seconds, arrival_seconds)
    total = torch.ones(1)
    dist.all_reduce(total)
    print(int(total))


def joining(server: Path, log: Path, rank: int, port: int, *seconds: float) -> forkserver.Child:
    """Start `join_and_sum` as one of two ranks in its own process; its output goes to `log`."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target = "tests.parallel.test_process_groups:join_and_sum"
    with open(log, "wb") as out:
        files = (0, out.fileno(), out.fileno())
        return forkserver.call(server, target, seconds, files, {**os.environ, **variables})


def test_rendezvous_late_rank_is_awaited_beyond_collective_timeout(server: Path, tmp_path: Path) -> None:
    """One rank joins 5 s late while the timeout of collectives is 3 s."""
    port, logs = free_port(), [tmp_path / "0", tmp_path / "1"]
    for rank in [joining(server, logs[0], 0, port, 0, 3, 120), joining(server, logs[1], 1, port, 5, 3, 120)]:
        rank.wait(120)
        rank.close()
    # earlier a rank may print which ranks it waits for
    assert [log.read_text().splitlines()[-1] for log in logs] == ["2", "2"]


def test_rendezvous_missing_rank_raises_rank_error_on_timeout(server: Path, tmp_path: Path) -> None:
    rank = joining(server, tmp_path / "0", 0, free_port(), 0, 2, 0.5)
    rank.wait(120)
    rank.close()
    errors = (tmp_path / "0").read_text()
    assert "RankError: rank 0: no rendezvous with 2 ranks at tcp://127.0.0.1" in errors
    assert ", not 1)" in errors
