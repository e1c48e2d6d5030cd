"""Our inner optimizer inside core's: gradient copies, norms, clipping, fp32 masters, sharding and gathers are core's.

This is what core's get_megatron_optimizer does for one dense group of model chunks, which knows no other inner
optimizer than Adam and SGD (optimizer/__init__.py). Core keeps the shards; `MegatronEngine` is the face.

The global gradient norm and clipping by it, left on the device. Core's own reads the norm back between gradients and
update: the device would stand idle until the update's kernels arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import OptimConfig
from megatron_ettin.optim import sharded_state
from megatron_ettin.optim.adamw import DecoupledAdamW, ParamInfo, ShardSlice, StableAdamW, TiedCopies
from megatron_ettin.optim.muon import NOT_INSIDE, Matrix, Muon, is_inside
from megatron_ettin.parallel.groups import OptimizerGroups
from megatron_ettin.platform.fp8 import finish_gather

OPTIMIZERS: dict[str, type[DecoupledAdamW]] = {"stable_adamw": StableAdamW, "adamw": DecoupledAdamW, "muon": Muon}


class MegatronEngine:
    """Core's optimizer around ours: one step at a learning rate, and its state as sharded tensors in model space."""

    def __init__(self, core: Any, inner: DecoupledAdamW, chunks: Sequence[Any], clip_grad: float) -> None:
        self.core, self.inner, self.chunks, self.clip_grad = core, inner, chunks, clip_grad
        self.distributed = isinstance(core, DistributedOptimizer)
        self.can_skip = True
        self._masters: sharded_state.Masters = {}

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.core.zero_grad()

    def schedule(self) -> Callable[..., Any]:
        """What runs a step's micro-batches forward and backward."""
        return get_forward_backward_func()

    def call_before_sum(self, callback: Callable[[], None]) -> None:
        def call_and_finalize(*arguments: Any, **named: Any) -> None:
            callback()
            finalize_model_grads(*arguments, **named)

        self.chunks[0].config.finalize_model_grads_func = call_and_finalize

    def finish_param_sync(self) -> None:
        """Wait for the gathers of updated weights, which overlap with the next forward pass: before anything but that
        pass reads them (a checkpoint, an evaluation, a comparison)."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                self._gather(chunk)

    @staticmethod
    def _gather(chunk: Any) -> None:
        """Every weight of a chunk from the ranks that updated it, now. Collective."""
        chunk.start_param_sync(force_sync=True)
        if chunk.ddp_config.overlap_param_gather:  # core leaves this to forward passes, which find nothing to wait for
            finish_gather(chunk.parameters())

    @contextlib.contextmanager
    def summon_full_params(self, writing: bool = False) -> Iterator[None]:
        """Inside, the model's weights may be read and, where `writing`, written."""
        self.finish_param_sync()
        yield

    def close(self) -> None:
        """Core keeps nothing outside of its objects."""

    def prepare(self) -> None:
        """Gradients become what the update reads, and their global norm, which stays on the device. Collective."""
        self.core.prepare_grads()
        self._norm = global_norm(self.core, self.inner.device)

    def norm(self) -> float:
        """The global gradient norm before clipping. Waits for the device."""
        return float(self._norm)

    def update(self, lr: float) -> None:
        """Update every weight from the prepared gradients. Collective. Where it is left out, nothing of the step is
        kept: neither moments nor the count of updates."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        if self.clip_grad:
            clip(self.core, self.clip_grad, self._norm)
        self.core.step_with_ready_grads()

    def step(self, lr: float) -> float:
        """`prepare`, `update` and `norm`."""
        self.prepare()
        self.update(lr)
        return self.norm()

    def sharded_state(self, model_state: dict[str, Any], loading: bool, metadata: dict[str, Any]) -> Any:
        """Masters and moments as sharded tensors `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>`, whole-parameter
        shapes, the same keys with and without the distributed optimizer. Collective."""
        if self.distributed:
            self._masters = sharded_state.masters_to_read(self.core) if loading else {}
            return sharded_state.sharded_state(self.core, model_state, self._masters)
        sharded = {id(entry.data): entry for entry in nested_values(model_state) if hasattr(entry, "data")}
        return {
            index: {
                name: make_sharded_optimizer_tensor(sharded[id(model)], tensor, f"optimizer.state.{name}")
                for name, tensor in (("param", main.data), *sorted(self.inner.state[main].items()))
            }
            for index, (model, main) in enumerate(main_parameters(self.core))
        }

    def load_sharded_state(self, state: Any, updates: int) -> None:
        """Take over what `sharded_state` asked for, read from a checkpoint. Collective."""
        if self.distributed:
            sharded_state.put_masters(self.core, self._masters)  # the moments are in place
            self._masters = {}
            # the masters came into this rank's shards alone; weights of a checkpoint in another precision are rounded
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
        """Start from the model's present weights (after loading weights alone). `exact`: id of a parameter in FP8 ->
        what it was cast from."""
        self.core.reload_model_params()
        if exact:
            sharded_state.set_master_weights(self.core, exact)

    def weights_to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint is to hold of the model: of weights in FP8 their masters, in 16 bits as of all others."""
        return sharded_state.from_masters(self.core, model_state) if self.distributed else model_state


def build_optimizer(
    chunks: Sequence[Any],
    optim: OptimConfig,
    bf16: bool,
    distributed: bool,
    groups: OptimizerGroups,
    device: torch.device,
) -> MegatronEngine:
    """The optimizer of this rank's model chunks (core's DistributedDataParallel). Collective."""
    if optim.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optim.name: muon needs torch.optim.Muon, which torch {torch.__version__} lacks; torch 2.9 has it"
        )
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=0.0,  # grad_norm.py clips
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
        fp8_recipe=chunks[0].config.fp8_recipe,
    )
    inner = inner_optimizer(chunks, optim, device)
    named = trained(chunks)
    core: Any
    if distributed:
        align_buckets(chunks)
        core = DistributedOptimizer(
            inner, config, None, _no_state, model_chunks=list(chunks),
            per_model_buffers={i: chunk.buffers for i, chunk in enumerate(chunks)}, data_parallel_group=groups.data,
            data_parallel_group_gloo=None, data_parallel_group_idx=groups.index_in_model,
            distributed_optimizer_instance_id=0,
        )  # fmt: skip
    elif bf16:
        core = Float16OptimizerWithFloat16Params(inner, config, None, _no_state)
    else:
        core = FP32Optimizer(inner, config, _no_state)
    core.grad_stats_parallel_group, core.tp_group = groups.grad_stats, groups.tensor
    wholes = {p: param_info(p, i, groups.tensor) for i, (_, p) in enumerate(named)}
    if optim.name == "muon":
        channels = chunks[0].config.kv_channels
        wholes |= {p: _matrix(wholes[p], name, p, channels) for name, p in named if is_inside(name, p)}
    tensors = {main: [ShardSlice(wholes[model])] for model, main in main_parameters(core)}
    sum_group = groups.tensor_and_data if distributed else groups.tensor
    inner.bind(tensors, len(named), sum_group if sum_group.size() > 1 else None)
    if groups.embedding is not None and groups.embedding.size() > 1:
        (copy,) = (index for index, (name, _) in enumerate(named) if name.endswith(NOT_INSIDE))
        inner.tied = TiedCopies(copy, groups.embedding)
    return MegatronEngine(core, inner, chunks, optim.clip_grad)


def inner_optimizer(chunks: Sequence[Any], optim: OptimConfig, device: torch.device) -> DecoupledAdamW:
    """Ours, on whole parameters: core or ZeRO then puts its shards in their place. `bind` is to follow."""
    inner = OPTIMIZERS[optim.name](
        parameter_groups(chunks, optim), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    inner.device = device
    return inner


def trained(chunks: Sequence[Any]) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that the optimizer updates."""
    return [(name, p) for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad]


def _no_state(*_: Any) -> None:
    """Core calls this to allocate the state; `bind` has done so."""


def param_info(model: torch.nn.Parameter, index: int, tensor_group: Any) -> ParamInfo:
    """Describe the whole of a parameter that tensor parallelism may have cut, without the rows that pad it for that."""
    split = getattr(model, "tensor_model_parallel", False)
    rows = model.shape[0] * (tensor_group.size() if split else 1)
    numel = getattr(model, "real_rows", rows) * (model.numel() // model.shape[0])
    return ParamInfo(index, numel, counts=split or tensor_group.rank() == 0)


def _matrix(whole: ParamInfo, name: str, p: torch.nn.Parameter, head_channels: int) -> Matrix:
    cut_dim = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]
    return Matrix(whole.index, whole.numel, whole.counts, name, head_channels, cut_dim)


def main_parameters(core: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(model parameter, the fp32 tensor or shard that the inner optimizer updates) of any of core's optimizers."""
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
    """Two groups, in the same order on every rank even where one is empty: matrices decay, norms and biases do not."""
    named = trained(chunks)
    common = {
        "max_lr": optim.max_lr,
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
    """Declare the padding of gradient buckets part of them. Core's fully_reshardable state gathers buckets without
    their padding but slices by padded offsets (distrib_optimizer.py), so that every tensor behind a padded bucket
    would be saved shifted, without an error: with pp > 1 the tied embedding has a bucket of its own that is padded."""
    for chunk in chunks:
        for buffer in chunk.buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def global_norm(core: Any, device: torch.device) -> torch.Tensor:
    """The norm of all gradients, each counted once, fp32 scalar. `core`: one of core's optimizers, whose main gradients
    are ready. Collective."""
    gradients = core.get_main_grads_for_grad_norm() if core.get_parameters() else []
    norm = torch.nn.utils.get_total_norm(gradients).to(device=device, dtype=torch.float32)
    group = core.get_grad_stats_parallel_group()
    if group.size() > 1:
        norm.square_()
        dist.all_reduce(norm, group=group)
        norm.sqrt_()
    return norm


def clip(core: Any, most: float, norm: torch.Tensor) -> None:
    """Scale all gradients so that their norm is `most` where it is more."""
    torch.nn.utils.clip_grads_with_norm_(core.get_parameters(), most, norm)
