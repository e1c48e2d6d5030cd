"""Rank and address from torchrun, a SLURM step or a single process; rendezvous; topologies."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.resolve import parse
from megatron_ettin.parallel.env import first_host, job_port, read_distributed_env
from megatron_ettin.parallel.topology import Topology
from tests import forkserver
from tests.pool import free_port

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "12345"}
STEP = {
    "SLURM_STEP_NODELIST": "gpu[03-06,9]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_distributed_env_torchrun_variables_are_read() -> None:
    place = read_distributed_env(TORCHRUN)
    assert (place.rank, place.world, place.local_rank, place.address, place.port) == (3, 8, 1, "node1", 12345)


def test_distributed_env_slurm_step_variables_are_read() -> None:
    place = read_distributed_env(STEP)
    assert (place.rank, place.world, place.local_rank, place.address) == (5, 16, 1, "gpu03")
    assert place.port == job_port("4711", "0")
    assert place.source == "slurm"


def test_distributed_env_slurm_batch_script_is_single_process() -> None:
    """SLURM_NTASKS is set in a batch script too, but no other task joins."""
    place = read_distributed_env(
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_NODELIST": "n[1-2]"}
    )
    assert (place.rank, place.world, place.address) == (0, 1, None)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[007,9],cpu1", "gpu007"), ("a-b[3-4]-ib", "a-b3-ib"), ("x,y", "x")],
)
def test_first_host_of_node_list_is_expanded(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_job_port_of_jobs_and_steps_rarely_collides() -> None:
    ports = {job_port(str(job), str(step)) for job in range(4000, 4500) for step in range(3)}
    assert len(ports) > 1450
    assert all(1024 < port < 65536 for port in ports)


def test_distributed_env_rank_outside_world_is_refused() -> None:
    with pytest.raises(UserError, match="rank 8 is not among 8 ranks"):
        read_distributed_env({**TORCHRUN, "RANK": "8"})


@pytest.fixture(scope="module")
def server() -> Path:
    """Return the socket of the session's fork server once it answers, so that no test waits for its imports."""
    path = forkserver.shared()
    forkserver.connect(path).close()
    return path


def join_and_sum(late_seconds: float, timeout_seconds: float, arrival_seconds: float) -> None:
    """Be a rank that joins late and sums a one over all ranks."""
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
    """Start `join_and_sum` as one of two ranks, in a process of its own; `log` is to have what it prints."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target = "tests.platform.test_rendezvous:join_and_sum"
    with open(log, "wb") as out:
        files = (0, out.fileno(), out.fileno())
        return forkserver.call(server, target, seconds, files, {**os.environ, **variables})


def test_rendezvous_late_rank_is_awaited_beyond_collective_timeout(server: Path, tmp_path: Path) -> None:
    """One rank joins 5 s late while the timeout of collectives is 3 s."""
    port, logs = free_port(), [tmp_path / "0", tmp_path / "1"]
    for rank in [joining(server, logs[0], 0, port, 0, 3, 120), joining(server, logs[1], 1, port, 5, 3, 120)]:
        rank.wait(120)
        rank.close()
    # before it a rank may say for whom it waits
    assert [log.read_text().splitlines()[-1] for log in logs] == ["2", "2"]


def test_rendezvous_missing_rank_raises_rank_error_on_timeout(server: Path, tmp_path: Path) -> None:
    rank = joining(server, tmp_path / "0", 0, free_port(), 0, 2, 0.5)
    rank.wait(120)
    rank.close()
    errors = (tmp_path / "0").read_text()
    assert "RankError: rank 0: no rendezvous with 2 ranks at tcp://127.0.0.1" in errors
    assert ", not 1)" in errors


def test_topology_coords_are_unique_per_rank() -> None:
    config = parse("1b", "mlm", "pretrain", words=["parallel.tp=2", "parallel.pp=4", "batch.micro_batch_rows=8"])
    topology = Topology.of(config, 32)
    assert topology.dp == 4
    places = {tuple(topology.coords(rank).items()) for rank in range(32)}
    assert len(places) == 32
    assert topology.coords(1) == {"tp": 1, "cp": 0, "dp": 0, "pp": 0}


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        ("parallel.pp=1", None),
        ("parallel.pp=2", "Et*6|tL"),
        ("parallel.pp=2 parallel.vp=2", "Et*2|t*2|t*2|tL"),
        ("parallel.pp=7", "Et|t|t|t|t|t|tL"),
    ],
)
def test_topology_pipeline_layout_matches_pp_and_vpp(words: str, layout: str | None) -> None:
    config = parse(
        "17m", "mlm", "pretrain", words=[*words.split(), "batch.micro_batch_rows=8", "batch.global_batch_rows=112"]
    )
    assert Topology.of(config, config.parallel.pp).pipeline_layout == layout
