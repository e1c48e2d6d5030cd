"""Run micro-batches as replays of one captured forward and backward pass (`runtime.cuda_graph`).

It serves runs whose host is slower than their device. A captured graph has fixed shapes: labels and boundaries are
padded to a capacity, and what the host computes anew for each step (the keys of dropout's masks) is a tensor. Padded
labels count for nothing, and boundaries at the end are chunks of no tokens, so the result is that of the ordinary pass.
A micro-batch that does not fit runs without the graph.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn.functional import pad

from megatron_ettin.base.log import log_info
from megatron_ettin.batching.batches import MicroBatch
from megatron_ettin.config.layouts import max_chunks_per_row
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.model.dropout import layer_keys
from megatron_ettin.model.loss import LossOutput
from megatron_ettin.model.packed import PackedRows
from megatron_ettin.platform.compile import CapturedGraph, Tensors
from megatron_ettin.platform.device import to_device

# room for masked tokens above their mean, in standard deviations
DEVIATIONS = 6


def label_capacity(config: Config, tokens: int) -> int:
    """Return the number of labels that a captured micro-batch of `tokens` tokens on this rank has room for."""
    chance = 1.0 if config.causal else config.data.mlm_probability
    labels = tokens * chance + DEVIATIONS * math.sqrt(tokens * chance * (1 - chance))
    return min(tokens, math.ceil(labels / 64) * 64)


class GraphedStep:
    """Replays the micro-batches of this rank. The main process logs the first one that does not fit."""

    def __init__(self, config: Config, tokens: int, is_main_process: bool) -> None:
        self.labels = label_capacity(config, tokens)
        self.chunks_per_row = max_chunks_per_row(config.data)
        # each row may end with padding, which is a chunk too
        self.boundaries = config.batch.micro_batch_rows * (self.chunks_per_row + 1) + 1
        self.layers, self.is_main_process = config.model.num_layers, is_main_process
        self.graph: CapturedGraph | None = None
        self.keys = functools.lru_cache(maxsize=1)(layer_keys)

    def replay(self, batch: MicroBatch, model: Any) -> LossOutput:
        """Run forward and backward of a micro-batch that fits, and return its losses, which the next call overwrites.

        The replay adds the gradients to core's buffers. Core's schedule then calls backward on the returned total,
        which depends on no weight.
        """
        if self.graph is None:
            self.graph = CapturedGraph(functools.partial(forward_and_backward, model, batch.packed))
        losses, correct = self.graph(self.inputs(batch))
        done = torch.zeros((), device=losses.device, requires_grad=True).clone()
        labels = batch.labels.numel()
        return LossOutput(done, losses[:labels], correct[:labels])

    def fits(self, batch: MicroBatch) -> bool:
        """Return whether a micro-batch fits into the captured one. The first that does not fit is logged."""
        labels, boundaries = batch.labels.numel(), batch.packed.cu_seqlens_q.numel()
        fits = labels <= self.labels and boundaries <= self.boundaries
        if not fits and self.is_main_process:
            self.is_main_process = False
            log_info(
                f"runtime.cuda_graph: a micro-batch of {boundaries - 1} chunks and {labels} labels has no room in a"
                f" captured one ({self.boundaries - 1}, {self.labels}) and runs without, as others"
                f" like it will; data.max_chunks_per_row is {self.chunks_per_row}"
            )
        return fits

    def inputs(self, batch: MicroBatch) -> Tensors:
        """Return the tensors that differ between micro-batches, in fixed shapes."""
        packed, tokens = batch.packed, len(batch.packed.segments)
        missing = self.labels - batch.labels.numel()
        boundaries = self.boundaries - packed.cu_seqlens_q.numel()
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
    """Run one micro-batch, add its gradients to core's buffers, and return `losses` and `correct` of its `LossOutput`.

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
    total, losses, correct = model(input_ids, packed, labels, label_positions)
    total.backward()
    return [losses, correct]
