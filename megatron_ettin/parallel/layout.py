"""The layout of a run: `Topology`, a validated value, and `Layout`, its process groups. Core's global groups are
created, asked and destroyed here and nowhere else, so that no other module needs to know that they are global."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_ettin.config.layouts import check_layout, stage_layers
from megatron_ettin.config.schema import Config


@dataclass(frozen=True)
class Topology:
    """Degrees of every axis over `world` ranks. Core's order of ranks: tp fastest, then cp, dp, pp slowest."""

    world: int
    tp: int
    pp: int
    vp: int
    cp: int
    dp: int
    layers: tuple[int, ...]  # of each of the pp x vp stages, in model order

    @classmethod
    def of(cls, config: Config, world: int) -> Topology:
        """The topology of a run on `world` ranks. Raises UserError where they do not divide."""
        parallel = config.parallel
        dp = check_layout(config, world)
        return cls(world, parallel.tp, parallel.pp, parallel.vp, parallel.cp, dp, tuple(stage_layers(config)))

    def coords(self, rank: int) -> dict[str, int]:
        """Place of `rank` on each axis."""
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
        named = {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": self.cp, "dp": self.dp}
        degrees = " ".join(f"{axis} {size}" for axis, size in named.items() if size > 1 or axis == "dp")
        return degrees + (f", layers {'+'.join(map(str, self.layers))}" if len(self.layers) > 1 else "")


@dataclass(frozen=True)
class Layout:
    """This rank's place and groups. Made by `initialize`; groups are torch process groups."""

    topology: Topology
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_group: Any
    pp_group: Any
    dp_group: Any

    @property
    def is_last_pipeline_rank(self) -> bool:
        return self.pp_rank == self.topology.pp - 1

    def chunk_stages(self) -> list[tuple[int | None, bool, bool]]:
        """(vp stage, holds the embedding?, holds the head?) of each model chunk of this rank."""
        if self.topology.vp == 1:
            return [(None, ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage())]
        return [
            (
                stage,
                ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            )
            for stage in range(self.topology.vp)
        ]

    def sum_over_world(self, values: list[float], device: torch.device) -> list[float]:
        """Sums over every rank; a rank that is not the one to count passes zeros."""
        vector = torch.tensor(values, dtype=torch.float64, device=device)
        if self.topology.world > 1:
            dist.all_reduce(vector)
        return vector.tolist()

    def of_each_rank(self, value: float, device: torch.device) -> list[float]:
        """Every rank's value, by rank."""
        mine = torch.tensor([value], dtype=torch.float64, device=device)
        if self.topology.world == 1:
            return mine.tolist()
        found = torch.empty(self.topology.world, dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(found, mine)
        return found.tolist()

    def from_chief(self, value: Any) -> Any:
        """Rank 0's value (any picklable one) on every rank."""
        if self.topology.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value (any picklable one), in the order of ranks, on every rank."""
        found: list[Any] = [value] * self.topology.world
        if self.topology.world > 1:
            dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.topology.world > 1:
            dist.barrier()


def initialize_model_parallel(topology: Topology, seed: int) -> Layout:
    """Create the groups of `topology` over torch's default group and seed core's RNG tracker."""
    ps.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
        context_parallel_size=topology.cp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        topology=topology,
        rank=dist.get_rank(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        dp_rank=ps.get_data_parallel_rank(),
        cp_rank=ps.get_context_parallel_rank(),
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(with_context_parallel=True),
    )


AXES = ("tp", "cp", "pp", "dp")


def axes_of_groups() -> dict[str, str]:
    """The axis of each of this rank's groups, by the group's name; what goes over dp and cp together is dp's."""
    groups = {
        "tp": [ps.get_tensor_model_parallel_group()],
        "cp": [ps.get_context_parallel_group()],
        "dp": [ps.get_data_parallel_group(with_context_parallel=whole) for whole in (False, True)],
        "pp": [ps.get_pipeline_model_parallel_group(), ps.get_embedding_group(check_initialized=False)],
    }
    # a later one wins: with one context-parallel rank, cp's groups can be dp's
    return {one.group_name: axis for axis, found in groups.items() for one in found if one is not None}


@dataclass(frozen=True)
class OptimizerGroups:
    """Groups that core's optimizers are given one by one."""

    data: Any  # shards of the distributed optimizer
    grad_stats: Any  # over which gradient norms are summed
    tensor: Any
    tensor_and_data: Any
    embedding: Any  # first and last stage, which hold copies of the tied embedding; None on stages between
    index_in_model: int


def optimizer_groups(distributed: bool) -> OptimizerGroups:
    model = ps.get_model_parallel_group()
    return OptimizerGroups(
        data=ps.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        grad_stats=ps.get_intra_distributed_optimizer_instance_group() if distributed else model,
        tensor=ps.get_tensor_model_parallel_group(),
        tensor_and_data=ps.get_tensor_and_data_parallel_group(with_context_parallel=True),
        embedding=ps.get_embedding_group(check_initialized=False),
        index_in_model=dist.get_rank(model),
    )


class ModelParallelUnit:
    """What DeepSpeed asks of its `mpu` (Megatron's parallel_state under older names). Ranks of context parallelism
    share weights and see other tokens: to ZeRO they are data-parallel ones."""

    def get_model_parallel_group(self) -> Any:
        return ps.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return ps.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return ps.get_tensor_model_parallel_rank()

    get_tensor_model_parallel_group = get_slice_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_slice_parallel_rank = get_model_parallel_rank

    def get_data_parallel_group(self) -> Any:
        return ps.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return ps.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return ps.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_pipeline_model_parallel_group(self) -> Any:
        return ps.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0


def destroy_model_parallel() -> None:
    """Destroy core's groups. torch's default group is the rendezvous's to destroy; both leak threads if left."""
    ps.destroy_model_parallel()
    for name, value in list(vars(ps).items()):
        if isinstance(value, dist.ProcessGroup):  # core 0.16 forgets one; its connections would stay open
            setattr(ps, name, None)
    gc.collect()
