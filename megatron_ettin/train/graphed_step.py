"""Run micro-batches as replays of one captured forward and backward pass (`runtime.cuda_graph`).

It serves runs whose host is slower than their device. A captured graph has fixed shapes: labels and boundaries are
padded to a capacity, and what the host computes anew for each step (the keys of dropout's masks) is a tensor. Padded
labels count for nothing, and boundaries at the end are chunks of no tokens, so the result is that of the ordinary pass.
A micro-batch that does not fit runs as always.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from megatron_ettin.base.log import log_info
from megatron_ettin.batching.batches import MicroBatch
from megatron_ettin.config.layouts import max_chunks_per_row
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.model.dropout import layer_keys
from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import CapturedGraph, Tensors
from megatron_ettin.platform.device import to_device
from megatron_ettin.train.totals import StepTotals, loss_and_labels

# room for masked tokens above their mean, in standard deviations
DEVIATIONS = 6


@dataclass(frozen=True)
class Capacity:
    """Shapes of a captured micro-batch."""

    labels: int
    """Labels in this rank's slices."""
    boundaries: int
    """Boundaries of chunks in whole rows."""

    @classmethod
    def of(cls, config: Config, tokens: int) -> Capacity:
        """Return the capacity for micro-batches of which this rank has `tokens` tokens."""
        chance = 1.0 if config.causal else config.data.mlm_probability
        labels = tokens * chance + DEVIATIONS * math.sqrt(tokens * chance * (1 - chance))
        rows = config.batch.micro_batch_rows
        # each row may end with padding, which is a chunk too
        return cls(min(tokens, math.ceil(labels / 64) * 64), rows * (max_chunks_per_row(config.data) + 1) + 1)


class GraphedStep:
    """Core's forward_step_func for a rank whose micro-batches are replayed; the main process reports misfits."""

    def __init__(self, config: Config, layers: int, tokens: int, is_main_process: bool) -> None:
        self.capacity, self.layers, self.is_main_process = Capacity.of(config, tokens), layers, is_main_process
        self.config = config
        self.graph: CapturedGraph | None = None
        self.keys = functools.lru_cache(maxsize=1)(layer_keys)

    def __call__(
        self, totals: StepTotals, ordinary: Callable[..., tuple[Any, Any]], batches: Iterator[MicroBatch], model: Any
    ) -> tuple[Any, Any]:
        """Replay one micro-batch and add its losses to `totals`; `ordinary` runs one that does not fit."""
        batch = next(batches)
        if not self.fits(batch):
            return ordinary(iter([batch]), model)
        if self.graph is None:
            self.graph = CapturedGraph(functools.partial(forward_and_backward, model, batch.packed))
        (loss,) = self.graph(self.inputs(batch))
        # the gradients are made already: core's schedule is given a loss that leads to none
        done = torch.zeros((), device=loss.device, requires_grad=True).clone()
        labels = batch.labels.numel()
        totals.add("loss", loss.clone())
        totals.add("labels", labels)
        return done, functools.partial(loss_and_labels, labels)

    def fits(self, batch: MicroBatch) -> bool:
        """Return whether a micro-batch has room in the captured one; the first that has none is logged."""
        labels, boundaries = batch.labels.numel(), batch.packed.cu_seqlens_q.numel()
        fits = labels <= self.capacity.labels and boundaries <= self.capacity.boundaries
        if not fits and self.is_main_process:
            self.is_main_process = False
            log_info(
                f"runtime.cuda_graph: a micro-batch of {boundaries - 1} chunks and {labels} labels has no room in a"
                f" captured one ({self.capacity.boundaries - 1}, {self.capacity.labels}) and runs without, as others"
                f" like it will; data.max_chunks_per_row is {max_chunks_per_row(self.config.data)}"
            )
        return fits

    def inputs(self, batch: MicroBatch) -> Tensors:
        """Return the tensors that differ between micro-batches, in fixed shapes."""
        packed, tokens = batch.packed, len(batch.packed.segments)
        missing = self.capacity.labels - batch.labels.numel()
        boundaries = self.capacity.boundaries - packed.cu_seqlens_q.numel()
        return [
            batch.input_ids,
            pad(batch.labels, (0, missing), value=IGNORE),
            pad(batch.label_positions, (0, missing)),
            pad(packed.cu_seqlens_q, (0, boundaries), value=tokens),
            packed.segments,
            packed.positions,
            packed.slots,
            to_device(self.keys(packed.dropout_key, self.layers), packed.slots.device),
        ]


def forward_and_backward(model: Any, like: PackedRows, tensors: Tensors) -> Tensors:
    """Run one micro-batch, add its gradients to core's buffers, and return the sum of its losses, float64.

    Args:
        model: the model chunk.
        like: boundaries of another micro-batch, for the values that all of them share.
        tensors: the micro-batch as `GraphedStep.inputs` returns it.
    """
    input_ids, labels, label_positions, boundaries, segments, positions, slots, keys = tensors
    packed = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=like.seq_len,
        max_seqlen_kv=like.seq_len,
        seq_len=like.seq_len,
        segments=segments,
        positions=positions,
        slots=slots,
        slice_start=like.slice_start,
        slice_tokens=like.slice_tokens,
        layer_keys=keys,
        causal_tokens=like.causal_tokens,
    )
    total, losses, _ = model(input_ids, packed, labels, label_positions)
    total.backward()
    return [losses.double().sum()]
