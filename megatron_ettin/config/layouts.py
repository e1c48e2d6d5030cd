"""Checks of the layout: what degrees of the axes, stages, engine and optimizer say together.

`check_parallel` needs no number of ranks; `check_layout` does, and runs in every rank before any group exists."""

from __future__ import annotations

import dataclasses

from megatron_ettin.base.counts import counted
from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.config.balance import layer_operations, split_evenly
from megatron_ettin.config.row_split import RowSplit
from megatron_ettin.config.schema import Config, ParallelConfig
from megatron_ettin.config.sizes import tensor_parallel_degrees

RECOMPUTED = ("core_attn", "mlp")


def check_parallel(config: Config) -> None:
    parallel, model = config.parallel, config.model
    degrees = tensor_parallel_degrees(model)
    if parallel.tp not in degrees:
        raise UserError(
            f"parallel.tp: {parallel.tp} does not divide {model.num_attention_heads} heads and ffn_hidden_size"
            f" {model.ffn_hidden_size}; allowed: {', '.join(map(str, degrees))}"
        )
    if (model.num_attention_heads // parallel.tp) % parallel.cp:
        heads = model.num_attention_heads // parallel.tp
        allowed = ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)
        raise UserError(
            f"parallel.cp: {parallel.cp} does not divide the {heads} heads of a tensor-parallel rank; allowed:"
            f" {allowed}"
        )
    if parallel.cp > 1 and config.batch.loss_normalization == "microbatch":
        raise UserError(
            "parallel.cp: 2 or more cuts rows, and loss_normalization=microbatch takes means of whole ones;"
            " use batch.loss_normalization=global or parallel.tp"
        )
    if parallel.vp > 1 and parallel.pp == 1:
        raise UserError(f"parallel.vp: {parallel.vp} model chunks need pipeline stages; parallel.pp is 1")
    if parallel.pp * parallel.vp > model.num_layers:
        raise UserError(
            f"parallel.pp x vp: {parallel.pp} x {parallel.vp} stages are more than {model.num_layers} layers"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        raise UserError("parallel.sequence_parallel: needs parallel.tp of 2 or more, found 1")
    if parallel.tp_overlap and not parallel.sequence_parallel:
        raise UserError(
            "parallel.tp_overlap: hides the gathers and scatters of sequence parallelism; add"
            " parallel.sequence_parallel=true (with parallel.tp of 2 or more)"
        )
    if parallel.engine == "megatron" and parallel.distributed_optimizer and config.optim.name == "muon":
        raise UserError(
            "optim.name: muon updates whole matrices, the distributed optimizer cuts them;"
            " add parallel.distributed_optimizer=false"
        )
    if parallel.pipeline_layers is not None:
        stage_layers(config)
    check_recompute(config)


def recomputed_modules(parallel: ParallelConfig) -> list[str]:
    """What selective recomputation recomputes."""
    return [name.strip() for name in parallel.recompute_modules.split(",")]


def check_recompute(config: Config) -> None:
    parallel = config.parallel
    if wrong := [name for name in recomputed_modules(parallel) if name not in RECOMPUTED]:
        raise UserError(
            f"parallel.recompute_modules: {wrong[0]!r} does not exist{nearest(wrong[0], RECOMPUTED)}; it is one or more"
            f" of {', '.join(RECOMPUTED)}"
        )
    if parallel.recompute_layers is not None and parallel.recompute != "full":
        raise UserError(
            f"parallel.recompute_layers: is of parallel.recompute=full, found {parallel.recompute}; selective"
            " recomputation is of every layer"
        )
    if not parallel.offload_layers:
        return
    if parallel.recompute != "none" or parallel.pp > 1:
        found = f"pp {parallel.pp}" if parallel.pp > 1 else f"recompute={parallel.recompute}"
        raise UserError(f"parallel.offload_layers: goes with neither recomputation nor pipeline stages, found {found}")
    if parallel.offload_layers >= config.model.num_layers:
        raise UserError(
            f"parallel.offload_layers: {parallel.offload_layers} is not below the model's {config.model.num_layers}"
            " layers: the last one's activations are wanted at once"
        )


def stage_layers(config: Config) -> list[int]:
    """Layers of each of the pp x vp stages in model order. Raises UserError for `pipeline_layers` that do not fit."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pp * parallel.vp
    if parallel.pipeline_layers is None:
        return split_evenly(layer_operations(config), stages)
    try:
        split = [int(part) for part in str(parallel.pipeline_layers).split(",")]
    except ValueError:
        split = []
    if len(split) != stages or sum(split) != layers or min(split) < 1:
        raise UserError(
            f"parallel.pipeline_layers: {parallel.pipeline_layers!r} must be {stages} whole numbers (pp x vp), each at"
            f" least 1, that sum to {layers} layers"
        )
    return split


def check_layout(config: Config, world: int) -> int:
    """The data-parallel degree of `world` ranks. Raises UserError where ranks or rows do not divide."""
    parallel, batch = config.parallel, config.batch
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world % model_ranks:
        raise UserError(
            f"parallel: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {model_ranks} does not divide {world}"
            f" rank{'s' if world > 1 else ''}"
        )
    dp = world // model_ranks
    if batch.global_batch_rows % (dp * batch.micro_batch_rows) and batch.loss_normalization == "microbatch":
        raise UserError(
            f"batch.global_batch_rows: {batch.global_batch_rows} is no multiple of dp {dp} x micro_batch_rows"
            f" {batch.micro_batch_rows}, and loss_normalization=microbatch gives micro-batches of any size equal weight"
        )
    alone = RowSplit.of(batch.global_batch_rows, dp, batch.micro_batch_rows).count
    if parallel.vp > 1 and alone % parallel.pp:
        raise UserError(
            f"batch: the interleaved schedule wants micro-batches a step divisible by pp {parallel.pp};"
            f" there are {alone}"
        )
    return dp


def micro_batch_group(config: Config) -> int:
    """Return what a rank's number of micro-batches is a multiple of: the interleaved schedule runs whole groups of
    pipeline ranks."""
    return config.parallel.pp if config.parallel.vp > 1 else 1


def has_fixed_shapes(config: Config) -> bool:
    """Return whether all micro-batches of the run have one shape: recorded passes and userbuffers know no other."""
    return config.run.cuda_graph or config.parallel.tp_overlap


def full_split(config: Config, dp: int) -> RowSplit:
    """Return how the rows of a full batch are shared out over ranks and micro-batches."""
    return RowSplit.of(config.batch.global_batch_rows, dp, config.batch.micro_batch_rows, micro_batch_group(config))


def micro_batches(config: Config, dp: int) -> int:
    """Micro-batches that each rank runs in a step of the full batch."""
    return full_split(config, dp).count


def with_split_rows(config: Config, dp: int) -> Config:
    """Return the configuration with the micro-batch that the ranks run: rows spread evenly, not filled up."""
    batch = dataclasses.replace(config.batch, micro_batch_rows=full_split(config, dp).size)
    return dataclasses.replace(config, batch=batch)


def describe_empty_rows(config: Config, dp: int) -> str | None:
    """Return what a step of the full batch leaves empty, or None where every place has a row."""
    split = full_split(config, dp)
    if not split.empty:
        return None
    return (
        f"{counted(split.rows, 'row')} on dp {dp}, {counted(split.count, 'micro-batch', 'micro-batches')} of"
        f" {split.size} each: {counted(split.empty, 'place')} of a step {'is' if split.empty == 1 else 'are'} empty"
        f" ({split.empty / split.places:.1%} of the work)"
    )
