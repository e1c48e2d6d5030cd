"""Checks of `parallel.engine=deepspeed`: which runs its ZeRO can take over."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.precisions import PRECISIONS
from megatron_ettin.config.schema import Config, ParallelConfig

STAGES = (1, 2, 3)


def zero_stage(parallel: ParallelConfig) -> int:
    """What is cut over data parallelism: 0 nothing of DeepSpeed's, 1 the optimizer's state, 2 also gradients, 3 also
    weights."""
    if parallel.engine != "deepspeed":
        return 0
    return 2 if parallel.zero_stage is None else parallel.zero_stage


def check_zero(config: Config) -> None:
    parallel = config.parallel
    if parallel.engine != "deepspeed":
        for key, unset in (("zero_stage", None), ("zero_offload", "none")):
            if (found := getattr(parallel, key)) != unset:
                raise UserError(f"parallel.{key}: {found} is of parallel.engine=deepspeed, found {parallel.engine}")
        return
    for key, reason in _refusals(config):
        raise UserError(f"{key}: {reason}")


def _refusals(config: Config) -> Iterator[tuple[str, str]]:
    """(key, why DeepSpeed cannot and the nearest that runs)."""
    parallel, precision, stage = config.parallel, PRECISIONS[config.precision.name], zero_stage(config.parallel)
    if parallel.pp > 1:
        yield (
            "parallel.engine",
            f"deepspeed has no pipeline stages here, found pp {parallel.pp}; use parallel.pp=1 with tp, cp and"
            " zero_stage, or parallel.engine=megatron",
        )
    if precision.fp8_recipe:
        yield (
            "precision.name",
            f"{config.precision.name} runs on parallel.engine=megatron; with deepspeed the nearest is bf16",
        )
    if config.optim.name == "muon":
        yield "optim.name", "muon updates whole matrices, ZeRO cuts them; with deepspeed use stable_adamw or adamw"
    if stage not in STAGES:
        yield "parallel.zero_stage", f"{stage} is none of DeepSpeed's: {', '.join(map(str, STAGES))}"
    if precision.compute == "bf16" and stage == 1 and parallel.zero_offload == "none":
        yield (
            "parallel.zero_stage",
            "1 in bf16 is what parallel.engine=megatron does with distributed_optimizer=true; with deepspeed use"
            " zero_stage=2 or 3",
        )
    if parallel.zero_offload == "all" and stage != 3:
        yield (
            "parallel.zero_offload",
            f"all moves weights too, which zero_stage=3 alone cuts; found zero_stage {stage}, with which optimizer"
            " goes",
        )
    if config.precision.gradients != "fp32":
        yield "precision.gradients", f"{config.precision.gradients} is of parallel.engine=megatron; with deepspeed fp32"
    if parallel.offload_layers:
        yield "parallel.offload_layers", "goes with parallel.engine=megatron; recompute=full saves memory with both"
