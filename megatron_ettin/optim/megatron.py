"""Wrap Megatron-Core's optimizers as a `TrainEngine`, with one of our optimizers inside.

Core copies gradients, keeps fp32 masters, shards them and gathers weights. `build_optimizer` replaces core's
get_megatron_optimizer, which supports no inner optimizer but Adam and SGD, for one dense group of model chunks.

The gradient norm and clipping stay on the device. Core's own clipping reads the norm back to the host between gradients
and update, so the device would be idle until the kernels of the update are queued.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import OptimConfig
from megatron_ettin.optim import sharded_state
from megatron_ettin.optim.adamw import DecoupledAdamW, ParamInfo, ShardSlice, StableAdamW, TiedCopies
from megatron_ettin.optim.engine import TrainEngine
from megatron_ettin.optim.muon import EMBEDDINGS, Matrix, Muon, is_hidden_matrix
from megatron_ettin.parallel.groups import OptimizerGroups
from megatron_ettin.platform.fp8 import finish_gather

OPTIMIZERS: dict[str, type[DecoupledAdamW]] = {"stable_adamw": StableAdamW, "adamw": DecoupledAdamW, "muon": Muon}


class MegatronEngine(TrainEngine):
    """TrainEngine around one of core's optimizers. `TrainEngine` documents the contract of each method."""

    def __init__(self, core: Any, inner: DecoupledAdamW, chunks: Sequence[Any], clip_grad: float) -> None:
        self.core, self.inner, self.chunks, self.clip_grad = core, inner, chunks, clip_grad
        self.distributed = isinstance(core, DistributedOptimizer)
        self._masters: sharded_state.Masters = {}

    def zero_grad(self) -> None:
        """Clear core's gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.core.zero_grad()

    def call_before_sum(self, callback: Callable[[], None]) -> None:
        """Make core's pipeline schedule call `callback` before it reduces the gradients over ranks."""

        def call_and_finalize(*arguments: Any, **named: Any) -> None:
            callback()
            finalize_model_grads(*arguments, **named)

        self.chunks[0].config.finalize_model_grads_func = call_and_finalize

    def finish_param_sync(self) -> None:
        """Gather the updated weights now if that would overlap with the next forward pass (collective)."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                self._gather(chunk)

    @staticmethod
    def _gather(chunk: Any) -> None:
        """Gather all weights of a chunk from the ranks that updated them (collective)."""
        chunk.start_param_sync(force_sync=True)
        # core does this in the forward pass, but after a forced sync the forward pass has nothing to wait for
        if chunk.ddp_config.overlap_param_gather:
            finish_gather(chunk.parameters())

    @contextlib.contextmanager
    def summon_full_params(self, writing: bool = False) -> Iterator[None]:
        """Make the model's weights readable in the block, by finishing the parameter sync (collective)."""
        self.finish_param_sync()
        yield

    def prepare(self) -> None:
        """Copy the gradients for the update and compute their global norm, which stays on the device (collective)."""
        self.core.prepare_grads()
        self._norm = global_norm(self.core, self.inner.device)

    def norm(self) -> float:
        """Return the global gradient norm before clipping; waits for the device."""
        return float(self._norm)

    def update(self, lr: float) -> None:
        """Clip the gradients and update every weight (collective).

        A step that skips this call changes neither the moments nor the count of updates.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.core.get_parameters(), self.clip_grad, self._norm)
        self.core.step_with_ready_grads()

    def sharded_state(self, model_state: dict[str, Any], loading: bool) -> Any:
        """Return masters and moments as sharded tensors, with keys that are the same for all of core's optimizers."""
        if self.distributed:
            self._masters = sharded_state.empty_masters(self.core) if loading else {}
            return sharded_state.sharded_state(self.core, model_state, self._masters)
        entries = sharded_state.entries_by_parameter(model_state)
        return {
            index: {
                name: make_sharded_optimizer_tensor(entries[id(model)], tensor, f"optimizer.state.{name}")
                for name, tensor in (("param", main.data), *sorted(self.inner.state[main].items()))
            }
            for index, (model, main) in enumerate(main_parameters(self.core))
        }

    def load_sharded_state(self, state: Any, updates: int) -> None:
        """Take over the tensors of `sharded_state` and the number of `updates` (collective)."""
        if self.distributed:
            # only masters are copied, because the moments were read in place
            sharded_state.copy_masters(self.core, self._masters)
            self._masters = {}
            # weights that another precision stored are rounded, and this rank has read only its shards of the masters
            self.core._copy_main_params_to_model_params()
            for chunk in self.chunks:
                self._gather(chunk)
        else:
            for index, (_, main) in enumerate(main_parameters(self.core)):
                main.data.copy_(state[index]["param"])
                for name, tensor in self.inner.state[main].items():
                    tensor.copy_(state[index][name])
        self.inner.updates = updates

    def reload_master_weights(self, exact: Mapping[int, torch.Tensor] | None = None) -> None:
        """Set the masters from the model's weights, or from `exact` for parameters stored in FP8."""
        self.core.reload_model_params()
        if exact:
            sharded_state.set_master_weights(self.core, exact)

    def weights_to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return the model's sharded tensors, with masters rounded to 16 bits in place of weights stored in FP8."""
        return sharded_state.with_masters(self.core, model_state) if self.distributed else model_state


def build_optimizer(
    chunks: Sequence[Any],
    optim: OptimConfig,
    bf16: bool,
    distributed: bool,
    groups: OptimizerGroups,
    device: torch.device,
) -> MegatronEngine:
    """Build the engine of this rank's model chunks, which are wrapped in core's DistributedDataParallel (collective).

    Raises:
        UserError: this torch has no Muon.
    """
    if optim.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optim.name=muon needs torch.optim.Muon, which torch {torch.__version__} lacks; install torch 2.9 or newer"
        )
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        # no clipping in core, because `MegatronEngine.update` clips
        clip_grad=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
        fp8_recipe=chunks[0].config.fp8_recipe,
    )
    inner = build_inner_optimizer(chunks, optim, device)
    named = trained_parameters(chunks)
    core: Any
    if distributed:
        align_buckets(chunks)
        core = DistributedOptimizer(
            inner, config, None, _init_state, model_chunks=list(chunks),
            per_model_buffers={i: chunk.buffers for i, chunk in enumerate(chunks)}, data_parallel_group=groups.data,
            data_parallel_group_gloo=None, data_parallel_group_idx=groups.index_in_model,
            distributed_optimizer_instance_id=0,
        )  # fmt: skip
    elif bf16:
        core = Float16OptimizerWithFloat16Params(inner, config, None, _init_state)
    else:
        core = FP32Optimizer(inner, config, _init_state)
    core.grad_stats_parallel_group, core.tp_group = groups.grad_stats, groups.tensor
    infos = {p: param_info(p, i, groups.tensor) for i, (_, p) in enumerate(named)}
    if optim.name == "muon":
        channels = chunks[0].config.kv_channels
        infos |= {p: _matrix(infos[p], name, p, channels) for name, p in named if is_hidden_matrix(name, p)}
    slices = {main: [ShardSlice(infos[model])] for model, main in main_parameters(core)}
    sum_group = groups.tensor_and_data if distributed else groups.tensor
    inner.bind(slices, len(named), sum_group if sum_group.size() > 1 else None)
    if groups.embedding is not None and groups.embedding.size() > 1:
        (index,) = (i for i, (name, _) in enumerate(named) if name.endswith(EMBEDDINGS))
        inner.tied = TiedCopies(index, groups.embedding)
    return MegatronEngine(core, inner, chunks, optim.clip_grad)


def build_inner_optimizer(chunks: Sequence[Any], optim: OptimConfig, device: torch.device) -> DecoupledAdamW:
    """Build our optimizer on unsharded parameters. Core or ZeRO then replaces them by shards; `bind` must follow."""
    inner = OPTIMIZERS[optim.name](
        parameter_groups(chunks, optim), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    inner.device = device
    return inner


def trained_parameters(chunks: Sequence[Any]) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the name and tensor of every parameter that the optimizer updates."""
    return [(name, p) for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad]


def _init_state(*_: Any) -> None:
    """Do nothing. Core calls it to allocate the optimizer's state, which `bind` has already allocated."""


def param_info(model: torch.nn.Parameter, index: int, tensor_group: Any) -> ParamInfo:
    """Return the description of a whole parameter; its size leaves out rows that pad it for tensor parallelism."""
    split = getattr(model, "tensor_model_parallel", False)
    rows = model.shape[0] * (tensor_group.size() if split else 1)
    numel = getattr(model, "real_rows", rows) * (model.numel() // model.shape[0])
    return ParamInfo(index, numel, is_counted=split or tensor_group.rank() == 0)


def _matrix(info: ParamInfo, name: str, p: Any, head_channels: int) -> Matrix:
    partition_dim = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
    return Matrix(info.index, info.numel, info.is_counted, name, head_channels, partition_dim)


def main_parameters(core: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield pairs of a model parameter and the fp32 tensor or shard that the inner optimizer updates for it.

    `core` is any of core's optimizers.
    """
    if isinstance(core, DistributedOptimizer):
        pairs = [
            (core.model_fp32_groups, core.shard_fp32_groups),
            (core.model_float16_groups, core.shard_fp32_from_float16_groups),
        ]
    elif isinstance(core, Float16OptimizerWithFloat16Params):
        pairs = [
            (core.float16_groups, core.fp32_from_float16_groups),
            (core.fp32_from_fp32_groups, core.fp32_from_fp32_groups),
        ]
    else:
        parameters = [group["params"] for group in core.optimizer.param_groups]
        pairs = [(parameters, parameters)]
    for models, mains in pairs:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)


def parameter_groups(chunks: Sequence[Any], optim: OptimConfig) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices with weight decay, and norms and biases without.

    The order is the same on every rank, and an empty group is kept.
    """
    named = trained_parameters(chunks)
    common = {
        "max_lr": optim.weight_decay_reference_lr,
        "momentum": optim.momentum,
        "adjust_lr": optim.adjust_lr,
        "min_lr": 0.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
    }
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(".bias")]
    others = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    return [{"params": decayed, "wd_mult": 1.0, **common}, {"params": others, "wd_mult": 0.0, **common}]


def align_buckets(chunks: Sequence[Any]) -> None:
    """Count the padding of gradient buckets as a part of the buckets.

    Core's fully_reshardable state gathers buckets without their padding but slices by padded offsets
    (distrib_optimizer.py), so every tensor after a padded bucket would be saved shifted, without an error. With pp > 1
    the tied embedding has a bucket of its own that is padded.
    """
    for chunk in chunks:
        for buffer in chunk.buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def global_norm(core: Any, device: torch.device) -> torch.Tensor:
    """Return the norm of all gradients, each counted once, as an fp32 scalar on `device` (collective).

    `core` is one of core's optimizers with its main gradients ready.
    """
    gradients = core.get_main_grads_for_grad_norm() if core.get_parameters() else []
    norm = torch.nn.utils.get_total_norm(gradients).to(device=device, dtype=torch.float32)
    group = core.get_grad_stats_parallel_group()
    if group.size() > 1:
        norm.square_()
        dist.all_reduce(norm, group=group)
        norm.sqrt_()
    return norm
