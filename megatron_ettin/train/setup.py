"""Build this rank's part of a run as configured: process groups, model chunks, optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ettin.batching.host import row_tokens
from megatron_ettin.config.layouts import full_batch_split
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import PRECISIONS
from megatron_ettin.faults.anomalies import AnomalyDetector
from megatron_ettin.faults.heartbeat import StepTimer
from megatron_ettin.model import init
from megatron_ettin.model.config import transformer_config
from megatron_ettin.model.model import EttinModel
from megatron_ettin.optim.deepspeed import build_zero, load_deepspeed
from megatron_ettin.optim.engine import TrainEngine
from megatron_ettin.optim.megatron import build_optimizer
from megatron_ettin.parallel.env import DistributedEnv, Topology
from megatron_ettin.parallel.groups import (
    Layout,
    destroy_model_parallel,
    initialize_model_parallel,
    optimizer_groups,
)
from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
from megatron_ettin.platform import Platform, detect
from megatron_ettin.platform.compile import enable_compile, should_compile
from megatron_ettin.platform.fp8 import reset_fp8_state
from megatron_ettin.platform.layers import free_overlap_buffers, layer_backend, make_overlap_buffers
from megatron_ettin.train.graphed_step import GraphedStep
from megatron_ettin.train.progress import Progress


@dataclass
class TrainState:
    """One rank's share of a training run: its progress, model and optimizer."""

    config: Config
    platform: Platform
    layout: Layout
    model_chunks: list[EttinModel]
    ddp_model_chunks: list[Any]
    """The same chunks inside the wrappers that reduce gradients; empty without an optimizer."""
    optimizer: TrainEngine | None
    graphed: GraphedStep | None = None
    progress: Progress = field(default_factory=Progress)
    """Steps done so far; replaced after each one."""
    clock: StepTimer = field(init=False)

    def __post_init__(self) -> None:
        """Let the step timer see the beginning of the step's first sum over the ranks.

        The timer must not reference this object: core's configuration holds the callback, and the reference cycle
        would keep the weights until Python collects garbage.
        """
        self.clock = StepTimer(self.platform)
        if self.optimizer is not None:
            self.optimizer.call_before_sum(self.clock.arrive)

    @property
    def detector(self) -> AnomalyDetector:
        """Anomaly detector for the next step, holding the recent gradient norms."""
        can_skip = self.optimizer is None or self.optimizer.can_skip
        return AnomalyDetector(self.config.resilience, self.progress.recent, can_skip)

    def finish_param_sync(self) -> None:
        """Wait for the parameter gather that overlaps with the next step's forward pass."""
        if self.optimizer is not None:
            self.optimizer.finish_param_sync()

    @contextlib.contextmanager
    def summon_full_params(self, writing: bool = False) -> Iterator[None]:
        """Make this rank's weights readable one by one inside the context and, if `writing`, writable. Collective."""
        if self.optimizer is None:
            yield
            return
        with self.optimizer.summon_full_params(writing):
            yield

    def live_optimizer_tensors(self) -> list[torch.Tensor]:
        """Return the masters and moments of this rank, which an update changes in place."""
        if self.optimizer is None:
            return []
        inner = self.optimizer.inner
        masters = [p for group in inner.param_groups for p in group["params"]]
        moments = [t for p in masters for t in inner.state[p].values() if isinstance(t, torch.Tensor)]
        return [p.data for p in masters] + moments

    def close(self) -> None:
        """Release references and buffers that would keep this rank's memory after the run."""
        if self.optimizer is not None:
            self.optimizer.close()
        # nodes of torch's graph whose hooks hold the model, which Python's garbage collector cannot see
        for chunk in self.ddp_model_chunks:
            if hasattr(chunk, "grad_accs"):
                chunk.grad_accs.clear()
        reset_fp8_state()
        if self.config.parallel.tp_overlap:
            free_overlap_buffers()


def setup_training(
    config: Config, platform: Platform, world: int, training: bool = True, initial_weights: bool = True
) -> TrainState:
    """Build this rank's part of the run. Collective.

    Args:
        config: Configuration of the run.
        platform: Device of this rank.
        world: Number of ranks.
        training: Whether gradient buffers and an optimizer are built.
        initial_weights: Whether the weights are drawn by name; drawing a billion numbers takes half a minute, which a
            caller that loads a checkpoint saves.

    Raises:
        UserError: The layout, the precision or a feature does not fit the device.
    """
    # without an optimizer nothing would keep the masters of FP8 weights
    if not training:
        config = config.with_keys({"precision.fp8_weights": False})
    platform.check_precision(config.precision.name)
    platform.check_offload(config.parallel.offload_layers)
    platform.check_tp_overlap(config.parallel.tp_overlap)
    if training and config.parallel.engine == "deepspeed":
        load_deepspeed()
    enable_compile(should_compile(config.runtime.compile, platform.is_gpu))
    topology = Topology.of(config, world)
    layout = initialize_model_parallel(topology, config.run.seed)
    # tokens of a micro-batch on this rank
    tokens = full_batch_split(config, topology.dp).size * row_tokens(config, topology) // topology.cp
    if config.parallel.tp_overlap:
        fp8 = PRECISIONS[config.precision.name].fp8_recipe is not None
        bf16 = not fp8 or config.precision.bf16_first_layers + config.precision.bf16_last_layers > 0
        make_overlap_buffers(tokens, config.model.hidden_size, topology.tp, fp8, bf16)
    chunks = build_chunks(config, platform, layout, initial_weights)
    if not training:
        return TrainState(config, platform, layout, chunks, [], None)
    compute = PRECISIONS[config.precision.name].compute
    if config.parallel.engine == "deepspeed":
        zero = build_zero(chunks[0], config, compute, optimizer_groups(True), platform.device)
        return TrainState(config, platform, layout, chunks, [zero.engine], zero)
    wrapped = wrap(config, chunks)
    sharded = config.parallel.distributed_optimizer
    groups = optimizer_groups(sharded)
    optimizer = build_optimizer(wrapped, config.optim, compute == "bf16", sharded, groups, platform.device)
    graphed = None
    if config.runtime.cuda_graph:
        platform.check_graph(chunks[0].config.backend.attention.name)
        graphed = GraphedStep(config, tokens, layout.rank == 0)
    return TrainState(config, platform, layout, chunks, wrapped, optimizer, graphed)


def build_single_process(config: Config, training: bool = False, initial_weights: bool = True) -> TrainState:
    """Build the whole model in this process, for evaluation, export checks and tools.

    The caller must destroy the process groups that exist afterwards. After an error there are none.
    """
    platform = detect(config.runtime.device)
    init_process_group(DistributedEnv(0, 1, 0, None, 0, "alone"), platform)
    try:
        return setup_training(config, platform, 1, training, initial_weights)
    except BaseException:
        destroy_model_parallel()
        destroy_process_group()
        raise


def build_chunks(config: Config, platform: Platform, layout: Layout, initial_weights: bool = True) -> list[EttinModel]:
    """Build this rank's model chunks (one, or `parallel.vpp` of them)."""
    backend = layer_backend(platform, config.precision.name, config.runtime.attention)
    core = transformer_config(config, backend, layout.topology.pipeline_layout, platform.is_gpu)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    weights = init.recipe_weights(config.run.seed, config.model)
    chunks = []
    for stage, has_embedding, has_head in layout.chunk_stages():
        chunk = EttinModel(core, groups, has_embedding, has_head, stage).to(platform.device)
        if initial_weights:
            init.init_weights(chunk, weights, layout.topology.tp, layout.tp_rank)
        chunks.append(chunk)
    return chunks


def wrap(config: Config, chunks: list[EttinModel]) -> list[DistributedDataParallel]:
    """Wrap each chunk in core's gradient buffers and reductions."""
    overlap, sharded = config.parallel.overlap, config.parallel.distributed_optimizer
    # core waits for gathered weights before a module's own forward; the output layer's are read by the loss instead,
    # and with pipeline stages they lie in buckets of their own, which nothing would wait for
    pipelined = config.parallel.pp > 1
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.gradients == "fp32",
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sharded and not pipelined,
        use_distributed_optimizer=sharded,
        fp8_param_gather=config.precision.fp8_weights,
    )
    core = chunks[0].config
    wrapped = [
        DistributedDataParallel(core, settings, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if overlap:
        core.no_sync_func = _one_or_list([chunk.no_sync for chunk in wrapped])
        if settings.overlap_param_gather:
            core.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _one_or_list(functions: list[Any]) -> Any:
    """Return the only function, or the list if there are several, as core expects."""
    return functions if len(functions) > 1 else functions[0]
