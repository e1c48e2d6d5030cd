"""Check the layout of a run and split the rows of a step over ranks and micro-batches.

`check_parallel`, `check_zero` (DeepSpeed) and `check_graphs` (CUDA graphs) need no number of ranks. `check_layout`
does, and runs on every rank before any process group exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.base.text import counted
from megatron_ettin.config.flops import layer_operations, split_evenly
from megatron_ettin.config.operations import ParallelConfig
from megatron_ettin.config.schema import Config, DataConfig
from megatron_ettin.config.tables import OBJECTIVES, PRECISIONS, tensor_parallel_degrees

RECOMPUTED = ("core_attn", "mlp")


def check_parallel(config: Config) -> None:
    """Raise UserError if parallel degrees, pipeline stages and optimizer do not fit each other or the model."""
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
            "parallel.cp: 2 or more splits rows, but loss_normalization=microbatch needs whole ones; use"
            " batch.loss_normalization=global, or parallel.tp instead of cp"
        )
    if parallel.vpp > 1 and parallel.pp == 1:
        raise UserError(f"parallel.vpp: {parallel.vpp} model chunks need pipeline stages, but parallel.pp is 1")
    if parallel.pp * parallel.vpp > model.num_layers:
        raise UserError(
            f"parallel.pp x vpp: {parallel.pp} x {parallel.vpp} stages are more than {model.num_layers} layers"
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
            "optim.name: muon updates whole matrices, but the distributed optimizer shards them; set"
            " parallel.distributed_optimizer=false"
        )
    if parallel.pipeline_layers is not None:
        stage_layers(config)
    check_recompute(config)


def check_recompute(config: Config) -> None:
    """Raise UserError if the keys of recomputation and of offloaded activations do not fit each other or the model."""
    parallel = config.parallel
    if wrong := [name for name in parallel.recompute_modules if name not in RECOMPUTED]:
        raise UserError(
            f"parallel.recompute_modules: {wrong[0]!r} does not exist{nearest(wrong[0], RECOMPUTED)}; it is one or more"
            f" of {', '.join(RECOMPUTED)}"
        )
    if parallel.recompute_layers is not None and parallel.recompute != "full":
        raise UserError(
            f"parallel.recompute_layers: needs parallel.recompute=full (found {parallel.recompute}); selective"
            " recomputation applies to every layer"
        )
    if not parallel.offload_layers:
        return
    if parallel.recompute != "none" or parallel.pp > 1:
        conflict = f"pp {parallel.pp}" if parallel.pp > 1 else f"recompute={parallel.recompute}"
        raise UserError(
            f"parallel.offload_layers: works with neither recomputation nor pipeline stages (found {conflict})"
        )
    if parallel.offload_layers >= config.model.num_layers:
        raise UserError(
            f"parallel.offload_layers: {parallel.offload_layers} is not below the model's {config.model.num_layers}"
            " layers; the last layer's activations are needed at once"
        )


def stage_layers(config: Config) -> list[int]:
    """Return the number of layers of each of the pp x vpp stages in model order.

    Raises:
        UserError: `parallel.pipeline_layers` does not fit.
    """
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pp * parallel.vpp
    if parallel.pipeline_layers is None:
        return split_evenly(layer_operations(config), stages)
    split = parallel.pipeline_layers
    if len(split) != stages or sum(split) != layers or min(split) < 1:
        raise UserError(
            f"parallel.pipeline_layers: {split} must be {stages} whole numbers (pp x vpp), each at"
            f" least 1, that sum to {layers} layers"
        )
    return split


def check_layout(config: Config, world: int) -> int:
    """Return the data-parallel degree of `world` ranks. Raises UserError if ranks or rows do not divide."""
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
            f"batch.global_batch_rows: {batch.global_batch_rows} is not a multiple of dp {dp} x micro_batch_rows"
            f" {batch.micro_batch_rows}, but loss_normalization=microbatch gives all micro-batches the same weight"
        )
    count = RowSplit.of(batch.global_batch_rows, dp, batch.micro_batch_rows).count
    if parallel.vpp > 1 and count % parallel.pp:
        raise UserError(
            f"batch: the interleaved schedule needs a multiple of pp {parallel.pp} micro-batches a step, but there are"
            f" {count}; change batch.micro_batch_rows or parallel.vpp"
        )
    return dp


def micro_batch_group(parallel: ParallelConfig) -> int:
    """Return the factor of a rank's number of micro-batches: pp under the interleaved schedule, else 1."""
    return parallel.pp if parallel.vpp > 1 else 1


def has_fixed_shapes(config: Config) -> bool:
    """Return whether all micro-batches must have one shape, which CUDA graphs and `parallel.tp_overlap` need."""
    return config.runtime.cuda_graph or config.parallel.tp_overlap


def full_batch_split(config: Config, dp: int) -> RowSplit:
    """Return how the rows of a full batch are shared out over ranks and micro-batches."""
    batch, group = config.batch, micro_batch_group(config.parallel)
    return RowSplit.of(batch.global_batch_rows, dp, batch.micro_batch_rows, group)


def micro_batches(config: Config, dp: int) -> int:
    """Return the number of micro-batches per rank in a step at the full batch size."""
    return full_batch_split(config, dp).count


def with_split_rows(config: Config, dp: int) -> Config:
    """Return the configuration with `batch.micro_batch_rows` set to the row slots of the evenly split full batch."""
    return config.with_keys({"batch.micro_batch_rows": full_batch_split(config, dp).size})


def describe_empty_rows(config: Config, dp: int) -> str | None:
    """Return a line about the empty slots of a step at the full batch size; None if every slot has a row."""
    split = full_batch_split(config, dp)
    if not split.empty:
        return None
    return (
        f"{counted(split.rows, 'row')} on dp {dp}, {counted(split.count, 'micro-batch', 'micro-batches')} of"
        f" {split.size} each: {counted(split.empty, 'row slot')} of a step {'is' if split.empty == 1 else 'are'} empty"
        f" ({split.empty / split.capacity:.1%} of the work)"
    )


STAGES = (1, 2, 3)


def zero_stage(parallel: ParallelConfig) -> int:
    """Return DeepSpeed's ZeRO stage; 0 under Megatron-Core.

    Stage 1 shards the optimizer state, 2 also the gradients, 3 also the weights.
    """
    if parallel.engine != "deepspeed":
        return 0
    return 2 if parallel.zero_stage is None else parallel.zero_stage


def check_zero(config: Config) -> None:
    """Raise UserError if DeepSpeed's keys are set for another engine, or if DeepSpeed cannot do the run."""
    parallel, precision, stage = config.parallel, PRECISIONS[config.precision.name], zero_stage(config.parallel)
    if parallel.engine != "deepspeed":
        for key, unset in (("zero_stage", None), ("zero_offload", "none")):
            if (value := getattr(parallel, key)) != unset:
                raise UserError(
                    f"parallel.{key}: {value} needs parallel.engine=deepspeed (found {parallel.engine}); remove it or"
                    " set the engine"
                )
        return
    if parallel.pp > 1:
        raise UserError(
            f"parallel.engine: deepspeed has no pipeline stages here (found pp {parallel.pp}); use parallel.pp=1 with"
            " tp, cp and zero_stage, or parallel.engine=megatron"
        )
    if precision.fp8_recipe:
        raise UserError(
            f"precision.name: {config.precision.name} needs parallel.engine=megatron; with deepspeed use bf16"
        )
    if config.optim.name == "muon":
        raise UserError("optim.name: muon updates whole matrices, but ZeRO shards them; use stable_adamw or adamw")
    if stage not in STAGES:
        raise UserError(f"parallel.zero_stage: {stage} is not one of DeepSpeed's: {', '.join(map(str, STAGES))}")
    if precision.compute == "bf16" and stage == 1 and parallel.zero_offload == "none":
        raise UserError(
            "parallel.zero_stage: 1 in bf16 is what parallel.engine=megatron with distributed_optimizer=true does; use"
            " that, or zero_stage=2 or 3"
        )
    if parallel.zero_offload == "all" and stage != 3:
        raise UserError(
            f"parallel.zero_offload: all moves weights too, which needs zero_stage=3 (found {stage}); use"
            " zero_offload=optimizer"
        )
    if config.precision.gradients != "fp32":
        raise UserError(f"precision.gradients: {config.precision.gradients} needs parallel.engine=megatron; use fp32")
    if parallel.offload_layers:
        raise UserError(
            "parallel.offload_layers: needs parallel.engine=megatron; recompute=full saves memory with both engines"
        )


# attention kernels that take chunk boundaries as tensors; the work of the others depends on the boundaries' values
KERNELS = ("te-fused", "flash", "varlen")
# data.max_chunks_per_row is by default the number of chunks of this length that fit into a row
TOKENS_A_CHUNK = 64


def max_chunks_per_row(data: DataConfig) -> int:
    """Return the number of chunks that a row of a captured graph has room for."""
    return data.max_chunks_per_row or max(1, data.seq_len // TOKENS_A_CHUNK)


def check_graphs(config: Config) -> None:
    """Raise UserError if `runtime.cuda_graph` is set and another key does not work with it."""
    if config.runtime.cuda_graph:
        for obstacle, instead in _graph_refusals(config):
            raise UserError(f"runtime.cuda_graph: does not work with {obstacle}; {instead}")


def _graph_refusals(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (setting that does not work with CUDA graphs, what to do) for each such setting of the run."""
    parallel, run = config.parallel, config.run
    if OBJECTIVES[run.objective].is_hybrid:
        yield f"objective {run.objective}, whose micro-batches are not alike", "runtime.cuda_graph=false"
    if parallel.pp > 1:
        yield f"pipeline stages (found pp {parallel.pp})", "use parallel.pp=1 or runtime.cuda_graph=false"
    for key, plain in (("engine", "megatron"), ("recompute", "none"), ("offload_layers", 0), ("overlap", False)):
        if (value := getattr(parallel, key)) != plain:
            yield f"parallel.{key}={value}", f"use parallel.{key}={str(plain).lower()} or runtime.cuda_graph=false"
    if PRECISIONS[config.precision.name].fp8_recipe == "delayed":
        yield (
            "precision.name=fp8-delayed, whose scales the host updates",
            "use fp8-current, or runtime.cuda_graph=false",
        )
    if config.precision.fp8_weights:
        yield "precision.fp8_weights, which are made outside of the graph", "use precision.fp8_weights=false"
    if config.batch.loss_normalization != "global":
        yield f"batch.loss_normalization={config.batch.loss_normalization}", "use global, or runtime.cuda_graph=false"
    attention = config.runtime.attention
    if attention not in ("auto", *KERNELS):
        yield f"runtime.attention={attention}", f"use one of {', '.join(KERNELS)}, or runtime.cuda_graph=false"


@dataclass(frozen=True)
class RowSplit:
    """Rows of one step, spread evenly over `dp` ranks that run `count` micro-batches of `size` row slots each.

    Every rank gets floor(rows / dp) rows, or one more, and divides them equally, rounded down or up, among its
    micro-batches. All micro-batches of a step have the same size, which pipeline stages need; a slot without a row is
    empty. If everything divides, micro-batch `index` of all ranks together holds consecutive rows.
    """

    rows: int
    dp: int
    count: int
    size: int

    @classmethod
    def of(cls, rows: int, dp: int, most: int, group: int = 1, fixed: bool = False) -> RowSplit:
        """Split `rows` over `dp` ranks in as few micro-batches of at most `most` rows as will do.

        Args:
            rows: rows of the step.
            dp: data-parallel ranks.
            most: rows that a micro-batch may hold.
            group: factor of the number of micro-batches of a rank (`micro_batch_group`).
            fixed: give every micro-batch `most` slots, even if fewer would do, because shapes must not change.
        """
        share = -(-rows // dp)
        count = -(-share // (most * group)) * group
        return cls(rows, dp, count, most if fixed else -(-share // count))

    @property
    def capacity(self) -> int:
        """Return the number of row slots that all ranks compute in the step, empty ones included."""
        return self.count * self.dp * self.size

    @property
    def empty(self) -> int:
        """Return the number of slots that have no row."""
        return self.capacity - self.rows

    def slots(self, rank: int, index: int) -> range:
        """Return the rows within the step that micro-batch `index` of data-parallel rank `rank` holds."""
        # the first `larger` ranks have one row more than the others
        share, larger = divmod(self.rows, self.dp)
        ends = [(n * (share + 1) // self.count, n * share // self.count) for n in (index, index + 1)]
        of_larger, of_others = (end - start for start, end in zip(*ends))
        before = larger * ends[0][0] + (self.dp - larger) * ends[0][1]
        start = before + min(rank, larger) * of_larger + max(0, rank - larger) * of_others
        return range(start, start + (of_larger if rank < larger else of_others))
