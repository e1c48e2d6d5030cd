"""Wrap DeepSpeed's ZeRO as a `TrainEngine`, around the same tensor-parallel model and the same optimizers.

ZeRO flattens parameters and partitions the flat tensors over data-parallel ranks; `bind` tells our optimizers which
range belongs to which parameter. Gradients are those of sums of losses. ZeRO's loss scale divides them by the number of
labels, which is known only after the last micro-batch. DeepSpeed averages over ranks, hence the factor of ranks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from megatron_ettin.base.errors import UserError, first_line
from megatron_ettin.config.layouts import zero_stage
from megatron_ettin.config.schema import Config
from megatron_ettin.optim import sharded_state
from megatron_ettin.optim.adamw import DecoupledAdamW, ParamInfo, ShardSlice
from megatron_ettin.optim.engine import TrainEngine
from megatron_ettin.optim.megatron import build_inner_optimizer, param_info, trained_parameters
from megatron_ettin.parallel.groups import ModelParallelUnit, OptimizerGroups
from megatron_ettin.platform.device import device_name


@dataclass(frozen=True)
class ZeroShard:
    """The part of a parameter that this rank updates."""

    flat: torch.Tensor
    """ZeRO's flat fp32 tensor that holds it."""
    flat_range: slice
    """Its range in `flat`."""
    param_range: slice
    """Its range in the flattened parameter."""


class DeepSpeedEngine(TrainEngine):
    """TrainEngine around DeepSpeed's engine. `TrainEngine` documents the contract of each method.

    DeepSpeed reduces the gradients in its update and clears them after it. No communication continues after a step.
    """

    # DeepSpeed knows the norm of the gradients only after it has updated the weights
    can_skip = False

    def __init__(
        self, engine: Any, inner: DecoupledAdamW, shapes: dict[str, torch.Size], stage: int, microbatch_means: bool
    ) -> None:
        self.engine, self.inner, self.shapes = engine, inner, shapes
        self.stage, self.microbatch_means = stage, microbatch_means
        self.zero, self.module = engine.optimizer, engine.module
        self.data_group = ModelParallelUnit().get_data_parallel_group()
        self.updates, self.scale = 0, 1.0
        self.before_sum: Callable[[], None] = lambda: None
        # ZeRO steps one group (in stage 3 one part of a group) after another: all belong to one update
        inner.register_step_pre_hook(lambda *_: setattr(inner, "updates", self.updates))

    def schedule(self) -> Callable[..., Any]:
        """Return `forward_backward`."""
        return self.forward_backward

    def call_before_sum(self, callback: Callable[[], None]) -> None:
        """Call `callback` before the last micro-batch, whose backward pass sums the gradients."""
        self.before_sum = callback

    def forward_backward(
        self, forward_step_func: Callable[..., Any], data_iterator: Any, num_microbatches: int, **_: Any
    ) -> list[dict[str, torch.Tensor]]:
        """Run a step's micro-batches as core's schedules do, for one stage and with DeepSpeed's backward.

        Returns the report of each micro-batch.
        """
        reports, labels = [], []
        self.zero.override_loss_scale(1.0)
        for number in range(num_microbatches):
            if number == num_microbatches - 1:
                self.before_sum()
            self.engine.set_gradient_accumulation_boundary(number == num_microbatches - 1)
            output, loss_of = forward_step_func(data_iterator, self.engine)
            loss, count, report = loss_of(output)
            if self.microbatch_means:
                loss, count = loss / count.clamp(min=1), torch.ones_like(count)
            self.engine.backward(loss)
            reports.append(report)
            labels.append(count)
        total = torch.stack(labels).sum(dtype=torch.float64)
        dist.all_reduce(total, group=self.data_group)
        self.scale = max(float(total), 1.0) / self.data_group.size()
        return reports

    def norm(self) -> float:
        """Return the global gradient norm of the latest update before clipping; NaN if it was not finite."""
        norm = float(self.engine.get_global_grad_norm())
        # DeepSpeed returns -1
        return norm if norm >= 0 else float("nan")

    def update(self, lr: float) -> None:
        """Reduce and clip the gradients and update every weight (collective)."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.zero.override_loss_scale(self.scale)
        self.engine.step()
        self.updates += 1

    @contextlib.contextmanager
    def summon_full_params(self, writing: bool = False) -> Iterator[None]:
        """Gather the weights that ZeRO-3 partitions; if `writing`, keep what rank 0 writes to them (collective)."""
        if self.stage < 3:
            yield
            return
        zero = load_deepspeed().zero
        with zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0 if writing else None):
            yield

    def sharded_state(self, model_state: dict[str, Any], loading: bool) -> Any:
        """Return masters and moments as sharded tensors; call it inside `summon_full_params` (collective)."""
        entries = sharded_state.entries_by_parameter(model_state)
        return {
            name: {
                key: make_sharded_optimizer_tensor(
                    entries[id(p)], self._full_tensor(name, key, loading), f"optimizer.state.{key}"
                )
                for key in ("param", "exp_avg", "exp_avg_sq")
            }
            for name, p in self.module.named_parameters()
        }

    @torch.no_grad()
    def load_sharded_state(self, state: Any, updates: int) -> None:
        """Take over the tensors that `sharded_state` requested (collective)."""
        for name, tensors in state.items():
            shard = self.shards.get(name)
            if shard is not None:
                for key, tensor in tensors.items():
                    part = tensor.flatten()[shard.param_range]
                    self._flat(shard, key)[shard.flat_range] = part.to(shard.flat.device)
        self.updates = updates
        # cast the masters to the weights of the model
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        pairs = zip(self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat, strict=True)
        for weights, masters in pairs:
            weights.copy_(masters)

    def reload_master_weights(self, exact: Mapping[int, torch.Tensor] | None = None) -> None:
        """Set the masters from the model's weights. `exact` is not used, because none of them are stored in FP8."""
        self.zero.refresh_fp32_params()

    def close(self) -> None:
        """Destroy the engine and, with it, torch's process groups."""
        self.engine.destroy()
        _release_globals()

    def bind(self, groups: OptimizerGroups, infos: dict[str, ParamInfo]) -> None:
        """Bind the inner optimizer to the parameters in ZeRO's flat tensors. `infos` is keyed by parameter name."""
        self.shards = dict(_shards(self.zero, self.module, self.data_group.rank()))
        slices: dict[torch.Tensor, list[ShardSlice]] = {flat: [] for flat in _flat_tensors(self.zero)}
        for name, shard in self.shards.items():
            slices[shard.flat].append(ShardSlice(infos[name], shard.flat_range))
        group = groups.tensor_and_data
        self.inner.bind(slices, len(infos), group if group.size() > 1 else None)

    def _flat(self, shard: ZeroShard, key: str) -> torch.Tensor:
        state: torch.Tensor = shard.flat.data if key == "param" else self.inner.state[shard.flat][key]
        return state

    def _full_tensor(self, name: str, key: str, loading: bool) -> torch.Tensor:
        """Return the whole fp32 tensor on the host of the rank that writes it; an empty one when loading."""
        shape = self.shapes[name]
        if loading:
            return torch.empty(shape)
        full = torch.zeros(shape.numel(), device=self.inner.device)
        if (shard := self.shards.get(name)) is not None:
            full[shard.param_range] = self._flat(shard, key)[shard.flat_range].to(full.device)
        dist.all_reduce(full, group=self.data_group)
        # core writes a replica's tensor once, so the other ranks keep nothing
        if self.data_group.rank() > 0:
            return torch.zeros(()).expand(shape)
        return full.view(shape).cpu()


def build_zero(
    chunk: Any, config: Config, compute: str, groups: OptimizerGroups, device: torch.device
) -> DeepSpeedEngine:
    """Build DeepSpeed's engine around `chunk`, which holds all its initial weights (collective).

    Args:
        chunk: the model.
        config: the run's configuration.
        compute: fp32 or bf16.
        groups: process groups of the optimizer.
        device: this rank's device.
    """
    deepspeed = load_deepspeed()
    named = trained_parameters([chunk])
    shapes = {name: p.shape for name, p in named}
    infos = {name: param_info(p, i, groups.tensor) for i, (name, p) in enumerate(named)}
    if groups.tensor.size() > 1:
        _reduce_over_tensor_ranks([p for _, p in named if getattr(p, "sequence_parallel", False)], groups.tensor)
    stage = zero_stage(config.parallel)
    if stage == 3:
        _register_tied(deepspeed.zero, chunk)
    inner = build_inner_optimizer([chunk], config.optim, device)
    engine, *_ = deepspeed.initialize(
        model=chunk,
        optimizer=inner,
        config=engine_settings(config, stage, compute, pinned=device.type != "cpu"),
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    optimizer = DeepSpeedEngine(engine, inner, shapes, stage, config.batch.loss_normalization == "microbatch")
    optimizer.bind(groups, infos)
    return optimizer


def engine_settings(config: Config, stage: int, compute: str, pinned: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration: one row and one micro-batch per step, because the caller splits the batch."""
    parallel = config.parallel
    offload = {"device": "cpu", "pin_memory": pinned}
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": parallel.overlap,
        # norms are not partitioned: gathering one takes as long as a matrix
        "stage3_param_persistence_threshold": 2 * config.model.hidden_size,
    }
    if parallel.zero_offload != "none":
        zero["offload_optimizer"] = offload
    if parallel.zero_offload == "all":
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad,
        "bf16": {"enabled": compute == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _register_tied(zero: Any, chunk: Any) -> None:
    """Register weights that the model's forward pass uses outside of the modules they belong to."""
    zero.register_external_parameter(chunk, chunk.embedding.word_embeddings.weight)
    zero.register_external_parameter(chunk, chunk.output_layer.bias)


def _reduce_over_tensor_ranks(parameters: list[torch.nn.Parameter], group: Any) -> None:
    """Sum the gradients of norms under sequence parallelism; on each rank they cover its own tokens only.

    Core sums them once per step; ZeRO takes each gradient as soon as it is made, so this is a hook.
    """

    def all_reduced(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=group)
        return total

    for p in parameters:
        p.register_hook(all_reduced)


def _flat_tensors(zero: Any) -> list[torch.Tensor]:
    # stage 3
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _shards(zero: Any, module: Any, data_rank: int) -> Iterator[tuple[str, ZeroShard]]:
    """Yield (name, this rank's shard) of each parameter of which this rank has a shard."""
    flats = _flat_tensors(zero)
    for name, p in module.named_parameters():
        # stage 3 splits each parameter in equal parts, of which the last are padded
        if hasattr(p, "ds_id"):
            index, start, numel = zero.grad_position[zero.get_param_id(p)]
            first = data_rank * numel
            own = max(0, min(numel, p.ds_numel - first))
            if own:
                yield name, ZeroShard(flats[index], slice(start, start + own), slice(first, first + own))
        elif p._hp_mapping is not None:
            ours, theirs = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            flat_range = slice(ours.start, ours.start + ours.numel)
            param_range = slice(theirs.start, theirs.start + theirs.numel)
            yield name, ZeroShard(flats[p._hp_mapping.param_group_index], flat_range, param_range)


def load_deepspeed() -> Any:
    """Return the module `deepspeed`, quiet and on torch's device.

    DeepSpeed looks for accelerators, logs at length and compiles kernels when it is imported or first used.

    Raises:
        UserError: it cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_name())
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import deepspeed
    # its search for compilers can raise anything
    except Exception as error:
        raise UserError(
            f"parallel.engine: deepspeed cannot be imported ({first_line(error)}); pip install"
            " 'megatron-ettin[deepspeed]', or set parallel.engine=megatron, whose distributed_optimizer shards the"
            " optimizer's state too"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # on a CPU its first use would spend minutes compiling collectives over shared memory on every host
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _release_globals() -> None:
    """Release what DeepSpeed keeps outside of its engines, because a process may train several runs.

    It keeps torch's process groups, the models of ZeRO-3 (a cached method of its coordinators holds them, and with them
    all groups and their threads), and its counters of modules and parameters, which ranks compare.
    """
    deepspeed = load_deepspeed()
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator

    for member in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        # the cache is in the closure of a decorator
        for cell in getattr(member, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()

    deepspeed.comm.destroy_process_group()
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
