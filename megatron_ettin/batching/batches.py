"""Make the micro-batches of a step on this rank's device: rows, labels and chunk boundaries.

Everything is a pure function of (config, data, step): each data-parallel rank and each pipeline stage makes its own
without communication. Batch warm-up counts nominal tokens (rows x the mean tokens a row), so its row counts are a
closed form. host.py makes a micro-batch in host memory, here or in a loader's worker; this module puts it on the device
and adds where its chunks begin and end.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ettin.batching.host import HostBatches
from megatron_ettin.batching.loader import LoadedBatch, Loader, worker_count
from megatron_ettin.batching.objectives import MaskingCollator, ObjectiveMix, dataset_collator
from megatron_ettin.config.layouts import full_batch_split, has_fixed_shapes, micro_batch_group
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE, PRECISIONS, ROW_OBJECTIVES
from megatron_ettin.data.blended_dataset import BlendedDataset, Row
from megatron_ettin.data.sampler import BatchSizes
from megatron_ettin.model.dropout import step_key
from megatron_ettin.model.packed import PackedRows, pack_rows
from megatron_ettin.parallel.groups import Layout
from megatron_ettin.parallel.topology import Topology
from megatron_ettin.platform.device import to_device


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on this rank: this rank's slices of them."""

    input_ids: torch.Tensor
    """Token ids [rows, buffer tokens / cp]."""
    labels: torch.Tensor
    """Token ids to predict [n]."""
    label_positions: torch.Tensor
    """Flat positions of the labels in `input_ids` [n]."""
    causal_labels: int
    """Number of labels in causal rows, which come first."""
    packed: PackedRows
    """Boundaries of the chunks."""
    tokens: int
    """Number of tokens without padding."""
    pairs: tuple[int, int]
    """Number of attended (query, key) pairs of one global and of one local layer."""


def buffer_tokens(seq_len: int, topology: Topology, precision_multiple: int = 1) -> int:
    """Return the row length on the device: seq_len rounded up to a multiple of `token_multiple`."""
    multiple = token_multiple(topology, precision_multiple)
    return -(-seq_len // multiple) * multiple


def token_multiple(topology: Topology, precision_multiple: int = 1) -> int:
    """Return the number that a row's tokens must be a multiple of.

    Every parallel axis then divides them, and the slice of each rank consists of whole blocks of the precision's
    quantisation.
    """
    blocks = 16 if precision_multiple == 1 else math.lcm(16, precision_multiple) * topology.tp
    return math.lcm(blocks * topology.cp, topology.tp * topology.cp)


def row_tokens(config: Config, topology: Topology) -> int:
    """Return the tokens of a run's row on the device, padding included."""
    return buffer_tokens(config.data.seq_len, topology, PRECISIONS[config.precision.name].multiple)


@dataclass
class Batches:
    """Micro-batches of any step for one data-parallel rank, on its device."""

    config: Config
    corpus: BlendedDataset
    sizes: BatchSizes
    label: MaskingCollator
    kinds: ObjectiveMix
    layout: Layout
    device: torch.device
    _loader: Loader | None = None

    @classmethod
    def of(cls, config: Config, corpus: BlendedDataset, layout: Layout, device: torch.device) -> Batches:
        sizes = BatchSizes.of(config.batch, corpus.mean_tokens_per_row)
        kinds = ObjectiveMix.of(config, corpus.mean_tokens_per_row)
        return cls(config, corpus, sizes, dataset_collator(config, corpus), kinds, layout, device)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row on the device, padding included."""
        return row_tokens(self.config, self.layout.topology)

    @functools.cached_property
    def host(self) -> HostBatches:
        """Maker of micro-batches in host memory, which needs no device."""
        topology, config = self.layout.topology, self.config
        fixed = has_fixed_shapes(config)
        flat = config.data.batching == "padded" and not fixed
        return HostBatches(
            self.corpus,
            self.sizes,
            self.label,
            self.kinds,
            config.windows,
            self.row_tokens,
            full_batch_split(config, topology.dp).size if fixed else config.batch.micro_batch_rows,
            topology.dp,
            self.layout.dp_rank,
            micro_batch_group(config),
            fixed,
            token_multiple(topology, PRECISIONS[config.precision.name].multiple) if flat else 0,
            flat and topology.pp > 1,
        )

    def micro_batch_count(self, step: int) -> int:
        """Return the number of micro-batches a rank runs at `step`: whole groups of pipeline ranks if interleaved."""
        return self.host.count(step)

    @contextlib.contextmanager
    def prefetched(self, first_step: int, end_step: int | None, is_gpu: bool) -> Iterator[None]:
        """Have the workers of `data.workers` make the batches of consecutive steps ahead.

        Args:
            first_step: The step, from 0, that is trained first.
            end_step: The step after the last one; None where it is not known.
            is_gpu: Whether tensors are pinned for a GPU, which also decides the default number of workers.
        """
        data = self.config.data
        workers = worker_count(data.workers, is_gpu)
        with contextlib.closing(Loader(self.host, first_step, end_step, workers, data.prefetch, is_gpu)) as loader:
            self._loader = loader
            try:
                yield
            finally:
                self._loader = None

    def step(self, step: int) -> Iterator[MicroBatch]:
        """Return an iterator over this rank's micro-batches of `step`, in order."""
        key = step_key(self.config.run.seed, self.config.run.phase, step)
        return (self.on_device(batch, key) for batch in self.loaded(step))

    def loaded(self, step: int) -> Iterator[LoadedBatch]:
        """Return the batches of `step` in host memory: the workers' where they come to this step, else made here."""
        if self._loader is not None and self._loader.next_step == step:
            return self._loader.step(step)
        return (LoadedBatch.of(self.host.make(step, index)) for index in range(self.host.count(step)))

    def held_out(self, rows: Sequence[Row | None], least: int = 0) -> MicroBatch:
        """Make a micro-batch of evaluation rows, all of one kind; None is an empty row. `least` as in `lay_out`."""
        causal = len(rows) if ROW_OBJECTIVES[self.kinds.kinds[0]].causal else 0
        return self.on_device(LoadedBatch.of(self.host.lay_out(rows, range(len(rows)), causal, least)), dropout_key=0)

    def on_device(self, batch: LoadedBatch, dropout_key: int) -> MicroBatch:
        """Copy a micro-batch to the device, without waiting for it."""
        host = batch.host
        context = self.layout.cp_rank, self.layout.topology.cp
        packed = pack_rows(
            host.lengths,
            host.input_ids.shape[1],
            self.device,
            host.slots,
            dropout_key,
            host.causal_places,
            context,
            host.flat,
        )
        ours = slice(packed.slice_start, packed.slice_start + packed.slice_tokens)
        labels = batch.labels[:, ours].reshape(-1)
        # labels are still on the host, where nonzero waits for no device
        label_positions = (labels != IGNORE).nonzero().squeeze(1)
        return MicroBatch(
            to_device(batch.input_ids[:, ours], self.device),
            to_device(labels[label_positions], self.device),
            to_device(label_positions, self.device),
            packed.count_causal(label_positions),
            packed,
            host.tokens,
            host.pairs,
        )
