"""DeepSpeed's ZeRO as the other data-parallel engine: around the same tensor-parallel model and the same optimizers,
with the same face as core's (build.py's MegatronEngine).

ZeRO flattens parameters and cuts the flat tensors over data-parallel ranks; our optimizers are told which piece of
which parameter lies where. Gradients are of sums of losses: their division by the number of labels, which is known
after the last micro-batch, is ZeRO's loss scale. DeepSpeed takes means over ranks, hence the factor of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from megatron_ettin.config.layouts import zero_stage
from megatron_ettin.config.schema import Config
from megatron_ettin.optim.adamw import DecoupledAdamW, ShardSlice
from megatron_ettin.optim.megatron import inner_optimizer, param_info, trained
from megatron_ettin.parallel.groups import ModelParallelUnit, OptimizerGroups
from megatron_ettin.platform.deepspeed import load_deepspeed, release_globals


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that this rank updates: elements `of` of the flattened parameter are `flat[at]`."""

    flat: torch.Tensor
    at: slice
    of: slice


class DeepSpeedEngine:
    """DeepSpeed's engine around a model chunk."""

    def __init__(self, engine: Any, inner: DecoupledAdamW, shapes: dict[str, torch.Size], config: Config) -> None:
        self.engine, self.inner, self.shapes, self.config = engine, inner, shapes, config
        self.zero, self.module = engine.optimizer, engine.module
        self.data_group = ModelParallelUnit().get_data_parallel_group()
        self.updates, self.scale = 0, 1.0
        self.before_sum: Callable[[], None] = lambda: None
        # ZeRO steps group after group, and stage 3 part after part of them: all belong to one update
        inner.register_step_pre_hook(lambda *_: setattr(inner, "updates", self.updates))

    def zero_grad(self) -> None:
        """DeepSpeed does so after each step."""

    def schedule(self) -> Callable[..., Any]:
        return self.forward_backward

    def call_before_sum(self, callback: Callable[[], None]) -> None:
        self.before_sum = callback

    def finish_param_sync(self) -> None:
        """Nothing of a step goes on after it."""

    def forward_backward(
        self, forward_step_func: Callable[..., Any], data_iterator: Any, num_microbatches: int, **_: Any
    ) -> list[dict[str, torch.Tensor]]:
        """What core's schedules do, for one stage and with DeepSpeed's backward. Returns what each micro-batch
        reports."""
        reports, labels = [], []
        self.zero.override_loss_scale(1.0)
        for number in range(num_microbatches):
            if number == num_microbatches - 1:
                self.before_sum()  # of gradients, in the last backward pass
            self.engine.set_gradient_accumulation_boundary(number == num_microbatches - 1)
            output, loss_of = forward_step_func(data_iterator, self.engine)
            loss, count, report = loss_of(output)
            if self.config.batch.loss_normalization == "microbatch":
                loss, count = loss / count.clamp(min=1), torch.ones_like(count)
            self.engine.backward(loss)
            reports.append(report)
            labels.append(count)
        total = torch.stack(labels).sum(dtype=torch.float64)
        dist.all_reduce(total, group=self.data_group)
        self.scale = max(float(total), 1.0) / self.data_group.size()
        return reports

    can_skip = False  # DeepSpeed knows the norm of the gradients once it has updated the weights

    def prepare(self) -> None:
        """A part of DeepSpeed's update."""

    def norm(self) -> float:
        """The global gradient norm of the latest update before clipping, NaN where it was not finite."""
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0 else float("nan")  # DeepSpeed's -1

    def update(self, lr: float) -> None:
        """Update every weight. Collective."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.zero.override_loss_scale(self.scale)
        self.engine.step()
        self.updates += 1

    @contextlib.contextmanager
    def summon_full_params(self, writing: bool = False) -> Iterator[None]:
        """Every rank holds all of its model's weights inside (ZeRO-3 cuts them); what is `written` there is kept."""
        if zero_stage(self.config.parallel) < 3:
            yield
            return
        zero = load_deepspeed().zero
        with zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0 if writing else None):
            yield

    def sharded_state(self, model_state: dict[str, Any], loading: bool, metadata: dict[str, Any]) -> Any:
        """build.MegatronEngine's, with the same keys and whole-parameter shapes. Inside `summon_full_params`.
        Collective."""
        sharded = {id(entry.data): entry for entry in nested_values(model_state) if hasattr(entry, "data")}
        return {
            name: {
                key: make_sharded_optimizer_tensor(
                    sharded[id(p)], self._whole(name, key, loading), f"optimizer.state.{key}"
                )
                for key in ("param", "exp_avg", "exp_avg_sq")
            }
            for name, p in self.module.named_parameters()
        }

    def load_sharded_state(self, state: Any, updates: int) -> None:
        """Take over what `sharded_state` asked for, read from a checkpoint. Collective."""
        for name, tensors in state.items():
            shard = self.shards.get(name)
            if shard is not None:
                for key, tensor in tensors.items():
                    self._flat(shard, key)[shard.at] = tensor.flatten()[shard.of].to(shard.flat.device)
        self._masters_to_weights()
        self.updates = updates

    def reload_master_weights(self, exact: Mapping[int, torch.Tensor] | None = None) -> None:
        """Start from the model's present weights (after loading weights alone)."""
        self.zero.refresh_fp32_params()

    def weights_to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint is to hold of the model."""
        return model_state

    def close(self) -> None:
        """End the engine and torch's process groups with it."""
        self.engine.destroy()
        release_globals()

    def bind(self, groups: OptimizerGroups, wholes: dict[str, Any]) -> None:
        """Tell the inner optimizer what its flat tensors consist of."""
        self.shards = dict(_shards(self.zero, self.module, self.data_group.rank()))
        pieces: dict[torch.Tensor, list[ShardSlice]] = {flat: [] for flat in _flat_tensors(self.zero)}
        for name, shard in self.shards.items():
            pieces[shard.flat].append(ShardSlice(wholes[name], shard.at))
        group = groups.tensor_and_data
        self.inner.bind(pieces, len(wholes), group if group.size() > 1 else None)

    def _flat(self, shard: Shard, key: str) -> torch.Tensor:
        return shard.flat.data if key == "param" else self.inner.state[shard.flat][key]

    def _whole(self, name: str, key: str, loading: bool) -> torch.Tensor:
        """The fp32 tensor on the host, gathered on the rank that writes it; a place to read it to when loading."""
        shape = self.shapes[name]
        if loading:
            return torch.empty(shape)
        whole = torch.zeros(shape.numel(), device=self.inner.device)
        if (shard := self.shards.get(name)) is not None:
            whole[shard.of] = self._flat(shard, key)[shard.at].to(whole.device)
        dist.all_reduce(whole, group=self.data_group)
        if self.data_group.rank() > 0:  # core writes a replica's tensor once: nothing to keep
            return torch.zeros(()).expand(shape)
        return whole.view(shape).cpu()

    @torch.no_grad()
    def _masters_to_weights(self) -> None:
        if zero_stage(self.config.parallel) < 3:
            self.zero.update_lp_params()
        else:
            for weights, masters in zip(
                self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat, strict=True
            ):
                weights.copy_(masters)


def build_zero(
    chunk: Any, config: Config, compute: str, groups: OptimizerGroups, device: torch.device
) -> DeepSpeedEngine:
    """DeepSpeed around `chunk`, whose weights are the whole initial ones. `compute`: fp32 or bf16. Collective."""
    deepspeed = load_deepspeed()
    named = trained([chunk])
    shapes = {name: p.shape for name, p in named}
    wholes = {name: param_info(p, i, groups.tensor) for i, (name, p) in enumerate(named)}
    if groups.tensor.size() > 1:
        _reduce_over_tensor_ranks([p for _, p in named if getattr(p, "sequence_parallel", False)], groups.tensor)
    if zero_stage(config.parallel) == 3:
        _register_tied(deepspeed.zero, chunk)
    inner = inner_optimizer([chunk], config.optim, device)
    engine, *_ = deepspeed.initialize(
        model=chunk,
        optimizer=inner,
        config=engine_settings(config, compute, pinned=device.type != "cpu"),
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    optimizer = DeepSpeedEngine(engine, inner, shapes, config)
    optimizer.bind(groups, wholes)
    return optimizer


def engine_settings(config: Config, compute: str, pinned: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Rows and micro-batches are ours: it is told of one row, one micro-batch a step."""
    parallel = config.parallel
    stage, offload = zero_stage(parallel), {"device": "cpu", "pin_memory": pinned}
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": parallel.overlap,
        # norms stay whole: gathering one costs as long as a matrix
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
    """Weights that the model's own forward pass uses outside of the modules they belong to."""
    zero.register_external_parameter(chunk, chunk.embedding.word_embeddings.weight)
    zero.register_external_parameter(chunk, chunk.output_layer.bias)


def _reduce_over_tensor_ranks(parameters: list[torch.nn.Parameter], group: Any) -> None:
    """Norms under sequence parallelism: each tensor-parallel rank's gradient is of its tokens. Core sums them once a
    step; ZeRO hands gradients on as soon as they are made."""

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        whole = gradient.clone()
        dist.all_reduce(whole, group=group)
        return whole

    for p in parameters:
        p.register_hook(summed)


def _flat_tensors(zero: Any) -> list[torch.Tensor]:
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _shards(zero: Any, module: Any, data_rank: int) -> Iterator[tuple[str, Shard]]:
    """This rank's part of each parameter that it has one of."""
    flats = _flat_tensors(zero)
    for name, p in module.named_parameters():
        if hasattr(p, "ds_id"):  # stage 3: each parameter is cut in equal parts, the last ones padded
            index, start, numel = zero.grad_position[zero.get_param_id(p)]
            first = data_rank * numel
            own = max(0, min(numel, p.ds_numel - first))
            if own:
                yield name, Shard(flats[index], slice(start, start + own), slice(first, first + own))
        elif p._hp_mapping is not None:
            ours, theirs = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            at = slice(ours.start, ours.start + ours.numel)
            yield (
                name,
                Shard(flats[p._hp_mapping.param_group_index], at, slice(theirs.start, theirs.start + theirs.numel)),
            )
