"""Create, look up and destroy the process groups of a run.

Core's global groups are used here and nowhere else, so that no other module needs to know that they are global.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_ettin.parallel.env import Topology


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates and torch process groups, made by `initialize_model_parallel`."""

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
        """Return whether this rank holds the last stages of the model."""
        return self.pp_rank == self.topology.pp - 1

    def chunk_stages(self) -> list[tuple[int | None, bool, bool]]:
        """Return (vpp stage, holds the embedding?, holds the head?) of each model chunk; stage None without vpp."""
        if self.topology.vpp == 1:
            return [(None, ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage())]
        return [
            (
                stage,
                ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            )
            for stage in range(self.topology.vpp)
        ]


def initialize_model_parallel(topology: Topology, seed: int) -> Layout:
    """Create the groups of `topology` over torch's default group and seed core's RNG tracker."""
    ps.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vpp if topology.vpp > 1 else None,
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
    """Return the axis of each of this rank's groups by the group's name; groups over dp and cp count as dp."""
    groups = {
        "tp": [ps.get_tensor_model_parallel_group()],
        "cp": [ps.get_context_parallel_group()],
        "dp": [ps.get_data_parallel_group(with_context_parallel=whole) for whole in (False, True)],
        "pp": [ps.get_pipeline_model_parallel_group(), ps.get_embedding_group(check_initialized=False)],
    }
    # if two axes share a group, the later axis counts: with one context-parallel rank, cp's groups can be dp's
    return {one.group_name: axis for axis, members in groups.items() for one in members if one is not None}


@dataclass(frozen=True)
class OptimizerGroups:
    """Process groups of core's optimizers, and this rank's index in one."""

    data: Any
    """Group that the distributed optimizer shards its state over."""
    grad_stats: Any
    """Group that gradient norms are summed over."""
    tensor: Any
    tensor_and_data: Any
    embedding: Any
    """First and last stage, which hold copies of the tied embedding; None on the stages between."""
    index_in_model: int
    """This rank's index in the model-parallel group."""


def optimizer_groups(distributed: bool) -> OptimizerGroups:
    """Return the groups of core's optimizers; `distributed`: whether the optimizer's state is sharded."""
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
    """DeepSpeed's `mpu`: Megatron's parallel_state under older names.

    Context-parallel ranks share weights but see different tokens, so ZeRO treats them as data-parallel.
    """

    get_model_parallel_group = staticmethod(ps.get_tensor_model_parallel_group)
    get_model_parallel_world_size = staticmethod(ps.get_tensor_model_parallel_world_size)
    get_model_parallel_rank = staticmethod(ps.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_group = get_slice_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_slice_parallel_rank = get_model_parallel_rank
    get_data_parallel_group = staticmethod(partial(ps.get_data_parallel_group, with_context_parallel=True))
    get_data_parallel_world_size = staticmethod(partial(ps.get_data_parallel_world_size, with_context_parallel=True))
    get_data_parallel_rank = staticmethod(partial(ps.get_data_parallel_rank, with_context_parallel=True))

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Return the ranks that ZeRO partitions over."""
        return dist.get_process_group_ranks(ps.get_data_parallel_group(with_context_parallel=True))

    get_pipeline_model_parallel_group = staticmethod(ps.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(lambda: 1)
    get_pipeline_model_parallel_rank = staticmethod(lambda: 0)


def destroy_model_parallel() -> None:
    """Destroy core's groups; `process_groups` destroys torch's default group. Groups left undestroyed leak threads."""
    ps.destroy_model_parallel()
    for name, value in list(vars(ps).items()):
        # core 0.16 keeps one of its groups, whose connections would stay open
        if isinstance(value, dist.ProcessGroup):
            setattr(ps, name, None)
    gc.collect()
