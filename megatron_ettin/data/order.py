"""The data order as a pure function: position -> (source, row, epoch) -> tokens, for any position, in constant memory.

Positions come in blocks of BLOCK_SLOTS. Every block gives each source its fixed number of slots, shuffled by a key of
(seed, phase, block); so a source's slots before a block are a multiplication, and its k-th slot is row
permutation(k mod rows) of epoch k // rows, each epoch with a key of its own. Nothing is stored, nothing depends on the
number of ranks, and a resume needs no state: the position is the state. An encoder and a decoder with one fingerprint
read the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_ettin.config.errors import UserError
from megatron_ettin.data.dataset import Dataset, open_dataset
from megatron_ettin.data.hashing import key64
from megatron_ettin.data.mixture import BLOCK_SLOTS, MixtureEntry, slot_counts
from megatron_ettin.data.permutation import Permutation
from megatron_ettin.data.rows import RowPlan, ensure_row_plan

ORDER_VERSION = 1  # raise it when the same inputs would give another order
CACHED_BLOCKS = 8
CACHED_PERMUTATIONS = 256

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One training row."""

    tokens: npt.NDArray[np.integer]  # real tokens, chunk after chunk; at most seq_len
    lengths: Int64Array  # tokens of each chunk
    source: int  # place in the mixture
    row: int  # of the source's row plan
    chunks: Int64Array  # global chunk numbers within the source's dataset
    position: int


class Corpus:
    """See `open_corpus`."""

    def __init__(
        self, datasets: Sequence[Dataset], plans: Sequence[RowPlan], counts: Sequence[int], seed: int, phase: str
    ) -> None:
        self.datasets = list(datasets)
        self.plans = list(plans)
        self.counts = list(counts)  # slots of each source in every block
        self.seed = seed
        self.phase = phase
        self.seq_len = plans[0].seq_len
        self.batching = plans[0].batching
        self.num_rows = sum(plan.num_rows for plan in plans)
        slot_tokens = sum(count * plan.mean_tokens_per_row for count, plan in zip(counts, plans, strict=True))
        self.mean_tokens_per_row = slot_tokens / BLOCK_SLOTS
        tokenizer = datasets[0].manifest.tokenizer
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self.vocab_size = tokenizer.vocab_size
        self.special_ids = tokenizer.special_ids
        self.pad_id, self.mask_id = tokenizer.pad_id, tokenizer.mask_id
        self.fingerprint = self._fingerprint()
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._shuffled_block)
        self._permutation = lru_cache(maxsize=CACHED_PERMUTATIONS)(self._keyed_permutation)

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(source, row, epoch) of each position >= 0."""
        given = np.asarray(positions, dtype=np.int64)
        flat = np.atleast_1d(given).ravel()
        if flat.size and int(flat.min()) < 0:
            raise IndexError(f"position {int(flat.min())}: positions begin at 0")
        source, turn = self._source_and_turn(flat)
        sizes = np.asarray([plan.num_rows for plan in self.plans], np.int64)[source]
        epoch, place = turn // sizes, turn % sizes
        row = np.empty_like(place)
        for key in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            chosen = (source == key[0]) & (epoch == key[1])
            row[chosen] = self._permutation(*key)(place[chosen]).astype(np.int64)
        return source.reshape(given.shape), row.reshape(given.shape), epoch.reshape(given.shape)

    def row(self, position: int) -> Row:
        """The row at one position."""
        return self.rows([position])[0]

    def rows(self, positions: Sequence[int] | Int64Array) -> list[Row]:
        """The rows at several positions: one look-up for all."""
        source, row, _ = self.locate(positions)
        return [
            self._read(int(s), int(r), int(position)) for s, r, position in zip(source, row, positions, strict=True)
        ]

    def tokens_at(self, positions: npt.ArrayLike) -> Int64Array:
        """Real tokens of the rows at the positions, without reading the rows."""
        source, row, _ = self.locate(positions)
        tokens = np.empty_like(row)
        for i in np.unique(source).tolist():
            tokens[source == i] = self.plans[i].tokens_of(row[source == i])
        return tokens

    def _source_and_turn(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The source of each position, and how many slots that source had before it."""
        if len(self.plans) == 1:
            return np.zeros_like(positions), positions
        source, turn = np.empty_like(positions), np.empty_like(positions)
        blocks, slots = np.divmod(positions, BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            source_of_slot, turn_of_slot = self._block(block)
            source[chosen] = source_of_slot[slots[chosen]]
            turn[chosen] = turn_of_slot[slots[chosen]]
        before: Int64Array = np.asarray(self.counts, np.int64)[source] * blocks
        return source, turn + before

    def _shuffled_block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """For each slot of a block: its source, and the source's slots before it within the block."""
        ordered = np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)
        shuffle = Permutation(BLOCK_SLOTS, key64("block", self.seed, self.phase, block))
        source = ordered[shuffle(np.arange(BLOCK_SLOTS)).astype(np.int64)]
        by_source = np.argsort(source, kind="stable")
        turn = np.empty_like(source)
        turn[by_source] = np.concatenate([np.arange(count, dtype=np.int64) for count in self.counts])
        return source, turn

    def _keyed_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.plans[source].num_rows, key64("rows", self.seed, self.phase, source, epoch))

    def _read(self, source: int, row: int, position: int) -> Row:
        dataset = self.datasets[source]
        chunks = self.plans[source].chunks_of(row)
        pieces = [dataset.chunk(int(chunk)) for chunk in chunks]
        if len(pieces[0]) > self.seq_len:  # padded batching only: cut, but let the row end as it would have
            pieces = [np.concatenate([pieces[0][: self.seq_len - 1], pieces[0][-1:]])]
        lengths = np.asarray([len(piece) for piece in pieces], dtype=np.int64)
        return Row(np.concatenate(pieces), lengths, source, row, np.asarray(chunks, np.int64), position)

    def _fingerprint(self) -> str:
        content: list[object] = ["order", ORDER_VERSION, self.seed, self.phase, self.seq_len, self.batching]
        for dataset, plan, count in zip(self.datasets, self.plans, self.counts, strict=True):
            content += [dataset.fingerprint, plan.fingerprint, count]
        return hashlib.sha256(":".join(str(part) for part in content).encode("utf-8")).hexdigest()


def open_corpus(mixture: Sequence[MixtureEntry], seq_len: int, batching: str, seed: int, phase: str) -> Corpus:
    """Open the datasets of a mixture (`parse_mixture`) and their row plans, which are built if they are not there."""
    if not mixture:
        raise UserError("data.mixture: empty; give a DATASET path or a list of {path, weight}")
    datasets = [open_dataset(entry.path) for entry in mixture]
    first = datasets[0]
    for dataset in datasets[1:]:
        ours, theirs = first.manifest.tokenizer, dataset.manifest.tokenizer
        if ours.fingerprint != theirs.fingerprint:
            raise UserError(
                f"data.mixture: {first.path} has tokenizer {ours.name} ({ours.fingerprint[:12]}) and {dataset.path} "
                f"has {theirs.name} ({theirs.fingerprint[:12]}); all datasets of a mixture share one tokenizer"
            )
    plans = [ensure_row_plan(dataset, seq_len, batching) for dataset in datasets]
    rows = [plan.num_rows for plan in plans]
    counts = slot_counts(mixture, rows, [plan.mean_tokens_per_row for plan in plans])
    return Corpus(datasets, plans, counts, seed, phase)
