"""Every layout of a number of GPUs: which are valid, how fast each is, what it holds; and why the others are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.checks import check
from megatron_ettin.config.layouts import check_layout
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import tensor_parallel_degrees
from megatron_ettin.plan.hardware import Gpu
from megatron_ettin.plan.memory import Memory, estimate
from megatron_ettin.plan.step_time import Constants, StepTime, operations_per_token, predict

USABLE_MEMORY = 0.92  # the rest is the driver's, NCCL's and the allocator's gaps
LONG_ROWS = 4096  # from here on context parallelism is looked at
MOST_STAGES, CHUNKS = 16, (1, 2, 4, 7)
STAGES = (1, 2, 4, 7, 8, 14, MOST_STAGES)  # looked at even where they do not divide the GPUs, to say so


@dataclass(frozen=True)
class Planned:
    """One valid layout."""

    config: Config
    dp: int
    time: StepTime
    memory: Memory
    row_tokens: float
    chunk_tokens: float
    gpus: int
    gpu: Gpu

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.config.batch.global_batch_rows * self.row_tokens / self.time.total / self.gpus

    @property
    def mfu(self) -> float:
        """Of the dense bf16 peak, whatever the precision."""
        return operations_per_token(self.config, self.chunk_tokens) * self.tokens_per_second_per_gpu / self.gpu.flops

    def to_json(self) -> dict[str, Any]:
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
class Rejected:
    layout: str
    reason: str


def search(
    config: Config, gpus: int, gpu: Gpu, constants: Constants, chunk_tokens: float, node: int,
    given: Set[str] = frozenset(),
) -> tuple[list[Planned], list[Rejected]]:  # fmt: skip
    """(valid layouts, fastest first; the others with their reasons). Of each combination of degrees the best
    micro-batch is kept, and recomputation is looked at only where it does not fit without. `given`: keys that stay as
    they are, be it at their defaults."""
    found, rejected = [], []
    open_recompute = config.parallel.recompute == "none" and "parallel.recompute" not in given
    for degrees in combinations(config, gpus, node, given):
        name = " ".join(f"{axis} {size}" for axis, size in degrees.items() if size > 1 or axis == "tp")
        options, reasons = [], []
        dp = gpus // math.prod(degrees[axis] for axis in ("tp", "cp", "pp"))
        sizes = micro_batch_sizes(config, dp)
        if "batch.micro_batch_rows" in given:
            sizes = [config.batch.micro_batch_rows]
        for recompute in ("none", "full") if open_recompute else (config.parallel.recompute,):
            for rows in sizes:
                try:
                    one = layout(config, degrees, rows, recompute, node, given)
                    options.append(planned(one, gpus, gpu, constants, chunk_tokens, node))
                except UserError as error:
                    reasons.append(str(error))
            if options:
                break
        if options:
            found.append(min(options, key=lambda one: one.time.total))
        else:
            rejected.append(Rejected(name, nearest_reason(reasons)))
    if not found and not rejected:
        own = config.parallel
        name = f"tp {own.tp} pp {own.pp} cp {own.cp}"
        rejected.append(Rejected(name, f"needs {own.tp * own.pp * own.cp} GPUs, there are {gpus}"))
    found.sort(key=lambda one: one.time.total)
    return found, rejected


def nearest_reason(reasons: list[str]) -> str:
    """Of all that were tried the one that lacks least: of memory the last, which is of the smallest micro-batch."""
    lacking = [reason for reason in reasons if reason.startswith("does not fit")]
    return lacking[-1] if lacking else reasons[0]


def combinations(config: Config, gpus: int, node: int, given: Set[str] = frozenset()) -> Iterator[dict[str, int]]:
    """Degrees that are worth a look: those that the configuration sets, else what the shape allows."""
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


def micro_batch_sizes(config: Config, dp: int) -> list[int]:
    """Return the sizes of micro-batches into which a rank's rows can be cut evenly, the largest first, up to twice the
    recipe's."""
    share = -(-config.batch.global_batch_rows // dp)
    sizes = {-(-share // count) for count in range(1, share + 1)}
    return sorted((size for size in sizes if size <= 2 * config.batch.micro_batch_rows), reverse=True)


def layout(config: Config, degrees: dict[str, int], rows: int, recompute: str, node: int, given: Set[str]) -> Config:
    """Return the configuration in a layout; what is not `given` is as usually fastest. Raises UserError."""
    if degrees["tp"] > node:
        raise UserError(f"tp {degrees['tp']} would span machines of {node} GPUs, on every layer's way")
    usual: dict[str, Any] = {
        "sequence_parallel": degrees["tp"] > 1,
        "distributed_optimizer": config.optim.name != "muon",
    }
    usual |= {"overlap": True, "recompute": recompute}
    free = {key: value for key, value in usual.items() if f"parallel.{key}" not in given}
    chosen = {f"parallel.{key}": value for key, value in {**degrees, **free}.items()}
    return config.with_keys({**chosen, "batch.micro_batch_rows": rows})


def efficiency(
    best: Planned, config: Config, constants: Constants, chunk_tokens: float, node: int, given: Set[str]
) -> tuple[int, float] | None:
    """Return (GPUs of one machine, the best layout's speed a GPU over that of the best layout on them), or None where
    the run has no more GPUs than that or no layout fits on them."""
    if best.gpus <= node:
        return None
    found, _ = search(config, node, best.gpu, constants, chunk_tokens, node, given)
    return (node, best.tokens_per_second_per_gpu / found[0].tokens_per_second_per_gpu) if found else None


def planned(one: Config, gpus: int, gpu: Gpu, constants: Constants, chunk_tokens: float, node: int) -> Planned:
    """One layout. Raises UserError where it is not valid or does not fit."""
    config = one
    dp = check_layout(one, gpus)
    if dp > config.batch.global_batch_rows:
        raise UserError(f"dp {dp} is more than the {config.batch.global_batch_rows} rows of a step")
    check(one)
    memory = estimate(one, dp, on_gpu=gpu.name != "cpu")
    room = int(gpu.memory_bytes * USABLE_MEMORY)
    if memory.total_bytes > room:
        raise UserError(
            f"does not fit: {memory.total_bytes / 2**30:.1f} GiB of {room / 2**30:.1f} usable, with micro-batches of"
            f" {one.batch.micro_batch_rows} and recompute={one.parallel.recompute}"
        )
    row_tokens = config.data.mean_tokens_per_row or float(config.data.seq_len)
    return Planned(
        one, dp, predict(one, gpu, dp, chunk_tokens, constants, node), memory, row_tokens, chunk_tokens, gpus, gpu
    )


def nearest_miss(rejected: list[Rejected]) -> str:
    """The layout that lacks least: memory says which limit to relax, else the first that does not divide."""
    short = [one for one in rejected if one.reason.startswith("does not fit")]
    best = min(short, key=lambda one: float(one.reason.split()[3])) if short else rejected[0]
    return f"{best.layout}: {best.reason}"


def limit_to_relax(reason: str, config: Config, gpus: int) -> str:
    """What to change so that the nearest layout becomes valid: the end of a message."""
    parallel = config.parallel
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
