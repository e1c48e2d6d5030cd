"""Search the layouts of a number of GPUs: time and memory of the valid ones, reasons against the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.checks import check
from megatron_ettin.config.layouts import check_layout
from megatron_ettin.config.operations import ParallelConfig
from megatron_ettin.config.schema import BatchConfig, Config
from megatron_ettin.config.tables import tensor_parallel_degrees
from megatron_ettin.plan.hardware import GpuSpec
from megatron_ettin.plan.memory import Memory, estimate
from megatron_ettin.plan.step_time import StepModel, StepTime, operations_per_token

# share of a GPU's memory; the driver, NCCL and gaps of the allocator need the rest
USABLE_MEMORY = 0.92
# fewest tokens of a row for which context parallelism is tried
LONG_ROWS = 4096
MOST_STAGES, CHUNKS = 16, (1, 2, 4, 7)
# pipeline degrees that are tried even if they do not divide the GPUs, so that the reason is reported
STAGES = (1, 2, 4, 7, 8, 14, MOST_STAGES)


@dataclass(frozen=True)
class Planned:
    """A valid layout with its predicted time and memory."""

    config: Config
    """The run in this layout."""
    dp: int
    """Data-parallel degree."""
    time: StepTime
    """Seconds of a step, by part."""
    memory: Memory
    """Bytes on the fullest GPU, by part."""
    row_tokens: float
    """Mean tokens of a row."""
    chunk_tokens: float
    """Mean tokens of a chunk."""
    gpus: int
    """Number of GPUs."""
    gpu: GpuSpec
    """Model of the GPUs."""

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Return the predicted tokens per second of each GPU."""
        return self.config.batch.global_batch_rows * self.row_tokens / self.time.total / self.gpus

    @property
    def mfu(self) -> float:
        """Return the model FLOP utilisation relative to the dense bf16 peak, whatever the precision."""
        return operations_per_token(self.config, self.chunk_tokens) * self.tokens_per_second_per_gpu / self.gpu.flops

    def to_json(self) -> dict[str, Any]:
        """Return the layout as the JSON object that `ettin plan --json` lists."""
        parallel = self.config.parallel
        axes = {key: getattr(parallel, key) for key in ("tp", "pp", "vpp", "cp")}
        return {
            **axes,
            "dp": self.dp,
            "micro_batch_rows": self.config.batch.micro_batch_rows,
            **{key: getattr(parallel, key) for key in ("sequence_parallel", "distributed_optimizer", "overlap")},
            "recompute": parallel.recompute,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "mfu": self.mfu,
            "step_seconds": self.time.total,
            "seconds": dataclasses.asdict(self.time),
            "peak_memory_bytes": self.memory.total_bytes,
            "memory_bytes": dataclasses.asdict(self.memory),
        }


@dataclass(frozen=True)
class RejectedLayout:
    """A layout that is not valid, and why."""

    layout: str
    reason: str


def search(
    config: Config, gpus: int, model: StepModel, given: Set[str] = frozenset()
) -> tuple[list[Planned], list[RejectedLayout]]:
    """Return the valid layouts, fastest first, and the others with their reasons.

    For each combination of degrees the fastest micro-batch is kept. Full recomputation is tried only for degrees at
    which nothing else is valid.

    Args:
        config: the run.
        gpus: number of GPUs.
        model: predicts the seconds of a step on these GPUs.
        given: keys that keep their values, even if these are the defaults.
    """
    valid, rejected = [], []
    open_recompute = config.parallel.recompute == "none" and "parallel.recompute" not in given
    for degrees in candidate_degrees(config, gpus, model.node, given):
        name = " ".join(f"{axis} {size}" for axis, size in degrees.items() if size > 1 or axis == "tp")
        options, reasons = [], []
        dp = gpus // math.prod(degrees[axis] for axis in ("tp", "cp", "pp"))
        sizes = micro_batch_sizes(config.batch, dp)
        if "batch.micro_batch_rows" in given:
            sizes = [config.batch.micro_batch_rows]
        for recompute in ("none", "full") if open_recompute else (config.parallel.recompute,):
            for rows in sizes:
                try:
                    candidate = apply_layout(config, degrees, rows, recompute, model.node, given)
                    options.append(predict_layout(candidate, gpus, model))
                except UserError as error:
                    reasons.append(str(error))
            if options:
                break
        if options:
            valid.append(min(options, key=lambda one: one.time.total))
        else:
            rejected.append(RejectedLayout(name, nearest_reason(reasons)))
    if not valid and not rejected:
        own = config.parallel
        name = f"tp {own.tp} pp {own.pp} cp {own.cp}"
        rejected.append(RejectedLayout(name, f"needs {own.tp * own.pp * own.cp} GPUs, there are {gpus}"))
    valid.sort(key=lambda one: one.time.total)
    return valid, rejected


def nearest_reason(reasons: list[str]) -> str:
    """Return the reason of the option nearest to valid: the last about memory (least rows), else the first."""
    lacking = [reason for reason in reasons if reason.startswith("does not fit")]
    return lacking[-1] if lacking else reasons[0]


def candidate_degrees(config: Config, gpus: int, node: int, given: Set[str] = frozenset()) -> Iterator[dict[str, int]]:
    """Yield the degrees to try, by axis: those that are set or `given`, else all that suit the model and the hosts."""
    own = config.parallel
    is_open = {axis: getattr(own, axis) == 1 and f"parallel.{axis}" not in given for axis in ("tp", "cp", "pp", "vpp")}
    degrees = [tp for tp in tensor_parallel_degrees(config.model) if tp == 1 or tp <= 2 * node]
    contexts = [1, 2, 4, 8] if config.data.seq_len >= LONG_ROWS else [1]
    most = min(MOST_STAGES, config.model.num_layers)
    stages = [pp for pp in range(1, most + 1) if pp in STAGES or gpus % pp == 0]
    for tp in degrees if is_open["tp"] else [own.tp]:
        for cp in contexts if is_open["cp"] else [own.cp]:
            for pp in stages if is_open["pp"] else [own.pp]:
                if tp * cp * pp <= gpus:
                    chunks = (CHUNKS if is_open["vpp"] else (own.vpp,)) if pp > 1 else (1,)
                    for vpp in chunks:
                        yield {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp}


def micro_batch_sizes(batch: BatchConfig, dp: int) -> list[int]:
    """Return the least rows of a micro-batch for each number of them, falling, up to twice `batch.micro_batch_rows`."""
    share = -(-batch.global_batch_rows // dp)
    sizes = {-(-share // count) for count in range(1, share + 1)}
    return sorted((size for size in sizes if size <= 2 * batch.micro_batch_rows), reverse=True)


def apply_layout(
    config: Config, degrees: dict[str, int], rows: int, recompute: str, node: int, given: Set[str]
) -> Config:
    """Return the configuration in a layout with `rows` of a micro-batch on hosts of `node` GPUs.

    Unless they are `given`, `sequence_parallel`, `distributed_optimizer` and `overlap` get usual values. Raises
    UserError if tensor parallelism would span hosts.
    """
    if degrees["tp"] > node:
        raise UserError(
            f"tp {degrees['tp']} would span hosts of {node} GPUs, so that every layer communicates over the network"
        )
    usual: dict[str, Any] = {
        "sequence_parallel": degrees["tp"] > 1,
        "distributed_optimizer": config.optim.name != "muon",
    }
    usual |= {"overlap": True, "recompute": recompute}
    free = {key: value for key, value in usual.items() if f"parallel.{key}" not in given}
    chosen = {f"parallel.{key}": value for key, value in {**degrees, **free}.items()}
    return config.with_keys({**chosen, "batch.micro_batch_rows": rows})


def efficiency(best: Planned, config: Config, model: StepModel, given: Set[str]) -> tuple[int, float] | None:
    """Compare the best layout's speed per GPU with that of the best layout on one host.

    Returns:
        (GPUs of one host, the best layout's speed per GPU as a share of theirs), or None if the run has no more GPUs
            than one host, or no layout fits on one.
    """
    if best.gpus <= model.node:
        return None
    layouts, _ = search(config, model.node, model, given)
    return (model.node, best.tokens_per_second_per_gpu / layouts[0].tokens_per_second_per_gpu) if layouts else None


def predict_layout(config: Config, gpus: int, model: StepModel) -> Planned:
    """Predict the time and memory of a layout. Raises UserError if it is not valid or does not fit."""
    dp = check_layout(config, gpus)
    if dp > config.batch.global_batch_rows:
        raise UserError(f"dp {dp} is more than the {config.batch.global_batch_rows} rows of a step")
    check(config)
    memory = estimate(config, dp, on_gpu=model.gpu.name != "cpu")
    room = int(model.gpu.memory_bytes * USABLE_MEMORY)
    if memory.total_bytes > room:
        raise UserError(
            f"does not fit: {memory.total_bytes / 2**30:.1f} GiB of {room / 2**30:.1f} usable, with micro-batches of"
            f" {config.batch.micro_batch_rows} and recompute={config.parallel.recompute}"
        )
    row_tokens = config.data.mean_tokens_per_row or float(config.data.seq_len)
    return Planned(config, dp, model.predict(config, dp), memory, row_tokens, model.chunk_tokens, gpus, model.gpu)


def nearest_miss(rejected: list[RejectedLayout]) -> str:
    """Describe the rejected layout nearest to valid: the one that lacks least memory, else the first."""
    too_large = [layout for layout in rejected if layout.reason.startswith("does not fit")]
    best = min(too_large, key=lambda layout: float(layout.reason.split()[3])) if too_large else rejected[0]
    return f"{best.layout}: {best.reason}"


def limit_to_relax(reason: str, parallel: ParallelConfig, gpus: int) -> str:
    """Return the limits to relax, as the end of a message; an empty text if no limit is the reason."""
    degrees = {axis: getattr(parallel, axis) for axis in ("tp", "pp", "cp")}
    given = ", ".join(f"parallel.{axis}={size}" for axis, size in degrees.items() if size > 1)
    ranks = parallel.tp * parallel.pp * parallel.cp
    if gpus % ranks:
        numbers = [n for n in (gpus - gpus % ranks, gpus + ranks - gpus % ranks) if n]
        return f"; relax --gpus ({' or '.join(map(str, numbers))}) or {given}"
    if reason.startswith("does not fit"):
        return f"; relax {f'{given}, ' * bool(given)}the memory (--gpu), --gpus or data.seq_len"
    if "rows of a step" in reason:
        return "; relax --gpus or batch.global_batch_rows"
    if "interleaved" in reason:
        return f"; relax {'parallel.vpp or ' * (parallel.vpp > 1)}batch.global_batch_rows"
    return ""
