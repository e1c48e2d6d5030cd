"""Rank, world and address from torchrun, a SLURM step or a single process; coordinates of ranks and pipeline layouts."""

from __future__ import annotations

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.resolve import parse
from megatron_ettin.parallel.env import Topology, first_host, job_port, read_distributed_env

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
    env = read_distributed_env(TORCHRUN)
    assert (env.rank, env.world, env.local_rank, env.address, env.port) == (3, 8, 1, "node1", 12345)


def test_distributed_env_slurm_step_variables_are_read() -> None:
    env = read_distributed_env(STEP)
    assert (env.rank, env.world, env.local_rank, env.address) == (5, 16, 1, "gpu03")
    assert env.port == job_port("4711", "0")
    assert env.source == "slurm"


def test_distributed_env_slurm_batch_script_is_single_process() -> None:
    """SLURM_NTASKS is set in a batch script too, but no other task joins."""
    env = read_distributed_env(
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_NODELIST": "n[1-2]"}
    )
    assert (env.rank, env.world, env.address) == (0, 1, None)


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


def test_topology_coords_are_unique_per_rank() -> None:
    config = parse("1b", "mlm", "pretrain", overrides=["parallel.tp=2", "parallel.pp=4", "batch.micro_batch_rows=8"])
    topology = Topology.of(config, 32)
    assert topology.dp == 4
    coords = {tuple(topology.coords(rank).items()) for rank in range(32)}
    assert len(coords) == 32
    assert topology.coords(1) == {"tp": 1, "cp": 0, "dp": 0, "pp": 0}


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ("parallel.pp=1", None),
        ("parallel.pp=2", "Et*6|tL"),
        ("parallel.pp=2 parallel.vpp=2", "Et*2|t*2|t*2|tL"),
        ("parallel.pp=7", "Et|t|t|t|t|t|tL"),
    ],
)
def test_topology_pipeline_layout_matches_pp_and_vpp(overrides: str, layout: str | None) -> None:
    config = parse(
        "17m",
        "mlm",
        "pretrain",
        overrides=[*overrides.split(), "batch.micro_batch_rows=8", "batch.global_batch_rows=112"],
    )
    assert Topology.of(config, config.parallel.pp).pipeline_layout == layout
