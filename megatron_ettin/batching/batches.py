"""Bring the micro-batches of a step to this rank's device.

Everything is a pure function of (config, data, step). host.py makes a micro-batch in host memory, in this process or in
a loader's worker; this module copies it to the device.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ettin.batching.host import HostBatch, HostBatches
from megatron_ettin.batching.loader import load_batches, worker_count
from megatron_ettin.config.schema import Config
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.model.dropout import step_key
from megatron_ettin.model.packed import PackedRows
from megatron_ettin.parallel.groups import Layout
from megatron_ettin.platform.device import to_device


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and labels of one forward pass on this rank's device. A context-parallel rank has a slice of each row."""

    input_ids: torch.Tensor
    """Token ids [rows, row tokens / cp]; [1, tokens / cp] if rows are laid end to end."""
    labels: torch.Tensor
    """Token ids to predict [n]."""
    label_positions: torch.Tensor
    """Flat positions of the labels in `input_ids` [n]."""
    causal_labels: int
    """Number of labels in causal rows; these labels come first."""
    packed: PackedRows
    """Boundaries of the chunks."""
    tokens: int
    """Number of tokens of the whole rows, not only of this rank's slices, without padding."""
    pairs: tuple[int, int]
    """Number of attended (query, key) pairs of the whole rows: in one global layer, in one local layer."""


@dataclass
class Batches:
    """Micro-batches of any step on this rank's device. Worker processes can prefetch those of consecutive steps."""

    config: Config
    """Configuration of the run."""
    host: HostBatches
    """Maker of micro-batches in host memory."""
    device: torch.device
    """Device of this rank."""
    _loaded: Iterator[HostBatch] | None = None
    _next_step: int = 0

    @classmethod
    def of(cls, config: Config, corpus: BlendedDataset, layout: Layout, device: torch.device) -> Batches:
        """Return the micro-batches for one rank. Raises UserError if model and dataset differ in vocabulary size."""
        return cls(config, HostBatches.of(config, corpus, layout.topology, layout.dp_rank, layout.cp_rank), device)

    @property
    def corpus(self) -> BlendedDataset:
        """Return the dataset that has the rows of the run."""
        return self.host.corpus

    @property
    def sizes(self) -> BatchSizes:
        """Return the number of rows of each step."""
        return self.host.sizes

    @contextlib.contextmanager
    def prefetched(self, first_step: int, end_step: int | None) -> Iterator[None]:
        """Prefetch the micro-batches of consecutive steps in `data.workers` worker processes.

        Args:
            first_step: the first step to train, counted from 0.
            end_step: the step after the last one; None if it is not known.
        """
        data, is_gpu = self.config.data, self.device.type != "cpu"
        workers = worker_count(data.workers, is_gpu)
        steps = itertools.count(first_step) if end_step is None else range(first_step, end_step)
        with load_batches(self.host, steps, workers, data.prefetch, is_gpu) as self._loaded:
            self._next_step = first_step
            try:
                yield
            finally:
                self._loaded = None

    def step(self, step: int) -> Iterator[MicroBatch]:
        """Return an iterator over this rank's micro-batches of `step`, in order. The caller must read it to its end.

        The micro-batches come from the workers if `step` is the next one that they deliver; otherwise this process
        makes them.
        """
        key, count = step_key(self.config.run.seed, self.config.run.phase, step), self.host.count(step)
        if self._loaded is not None and step == self._next_step:
            self._next_step += 1
            return (self.on_device(batch, key) for batch in itertools.islice(self._loaded, count))
        return (self.on_device(self.host.make(step, index), key) for index in range(count))

    def on_device(self, batch: HostBatch, dropout_key: int = 0) -> MicroBatch:
        """Start to copy a micro-batch to the device. `dropout_key` is the `step_key` of its step."""
        input_ids, labels, label_positions = (
            to_device(torch.as_tensor(array), self.device)
            for array in (batch.input_ids, batch.labels, batch.label_positions)
        )
        packed = PackedRows.of(batch.boundaries, self.device, dropout_key)
        return MicroBatch(input_ids, labels, label_positions, batch.causal_labels, packed, batch.tokens, batch.pairs)
