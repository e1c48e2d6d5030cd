"""Describe a launch as values that need no process group: this process among its ranks, and the parallel layout.

`read_distributed_env` reads the rank from torchrun's variables or SLURM's step variables; else it is a single process.

SLURM's variables count only inside a step (srun): a batch script's own shell has SLURM_NTASKS too, but no peers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.config.schema import Config

# ports of rendezvous, below the range from which systems assign ports by themselves
FIRST_PORT, PORTS = 15_000, 17_000


@dataclass(frozen=True)
class DistributedEnv:
    """This process among the ranks of a launch."""

    rank: int
    world: int
    local_rank: int
    address: str | None
    """Host where the ranks meet; None for a single process."""
    port: int
    source: str
    """"torchrun", "slurm" or "alone"."""


def read_distributed_env(environment: Mapping[str, str] | None = None) -> DistributedEnv:
    """Return the rank and rendezvous address. Raises UserError for variables that contradict each other."""
    variables = os.environ if environment is None else environment
    if "RANK" in variables and "WORLD_SIZE" in variables:
        source, port = "torchrun", int(variables.get("MASTER_PORT", 29_500))
        rank, world, local_rank = variables["RANK"], variables["WORLD_SIZE"], variables.get("LOCAL_RANK", 0)
        address = variables.get("MASTER_ADDR", "127.0.0.1")
    elif "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        own_port = job_port(variables.get("SLURM_JOB_ID", "0"), variables.get("SLURM_STEP_ID", "0"))
        source, port = "slurm", int(variables.get("MASTER_PORT") or own_port)
        rank, world = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
        local_rank = variables.get("SLURM_LOCALID", 0)
        address = variables.get("MASTER_ADDR") or first_host(variables["SLURM_STEP_NODELIST"])
    else:
        return DistributedEnv(0, 1, 0, None, 0, "alone")
    env = DistributedEnv(int(rank), int(world), int(local_rank), address, port, source)
    if not 0 <= env.rank < env.world:
        raise UserError(f"{source}: rank {env.rank} is not among {env.world} ranks")
    return env


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `n[03-07,9],m1` -> `n03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST: {nodelist!r} names no host")
    return match[1] + (match[2] or "") + (match[3] or "")


def job_port(job_id: str, step_id: str) -> int:
    """Return a port computed from job and step, so that two jobs on one node rarely share one."""
    number = int(re.sub(r"\D", "", job_id) or 0) * 31 + int(re.sub(r"\D", "", step_id) or 0)
    return FIRST_PORT + number % PORTS


def is_launched() -> bool:
    """Return whether torchrun, or srun with several tasks, started this process."""
    by_srun = "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return by_srun or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def rank_of_environment() -> int:
    """Return this process's rank by torchrun's or SLURM's variables; 0 without either."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


@dataclass(frozen=True)
class Topology:
    """Degrees of every axis over all ranks. In core's order of ranks, tp varies fastest, then cp, dp and pp."""

    world: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    layers: tuple[int, ...]
    """Number of layers of each of the pp x vpp stages, in model order."""

    @classmethod
    def of(cls, config: Config, world: int) -> Topology:
        """Return the topology of a run on `world` ranks. Raises UserError if the run's degrees do not divide them."""
        # not at the top, because every command imports this module
        from megatron_ettin.config.layouts import check_layout, stage_layers

        parallel = config.parallel
        dp = check_layout(config, world)
        return cls(world, parallel.tp, parallel.pp, parallel.vpp, parallel.cp, dp, tuple(stage_layers(config)))

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank on each axis."""
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        return {"tp": tp, "cp": cp, "dp": dp, "pp": pp}

    @property
    def pipeline_layout(self) -> str | None:
        """Core's pipeline layout, e.g. `Et*4|t*3L`; None for one stage."""
        if len(self.layers) == 1:
            return None
        stages = [f"t*{count}" if count > 1 else "t" for count in self.layers]
        stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
        return "|".join(stages)

    def __str__(self) -> str:
        named = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "dp": self.dp}
        degrees = " ".join(f"{axis} {size}" for axis, size in named.items() if size > 1 or axis == "dp")
        return degrees + (f", layers {'+'.join(map(str, self.layers))}" if len(self.layers) > 1 else "")
