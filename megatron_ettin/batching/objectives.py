"""Make inputs and labels of a row for its row objective (config/tables.py), and choose each row's objective.

`mlm` is the masking of transformers' DataCollatorForLanguageModeling (Bernoulli over non-special tokens; of the chosen
80 % become [MASK], half of the rest a uniformly random id, the others stay). Its random numbers are a hash of (seed,
phase, order index, token position), so masks are the same on every layout and after every resume.
`clm` shifts by one inside each chunk; the last token of a chunk predicts nothing.
`mntp` masks as `mlm` does, and the position before a masked token predicts it. The first token of a chunk is never
masked, because no position before it could predict it.

Rows of a step come in the shuffled order of the data, so its first slots are a random sample. Under a hybrid objective
the first slots have causal rows, and the others have rows with masked tokens. So a micro-batch of any layout has its
causal rows first. At most one micro-batch of a step mixes objectives. The number of causal rows is a pure function of
the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE, OBJECTIVES, ROW_OBJECTIVES
from megatron_ettin.config.values import Points, parse_points, share_at
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.data.hashing import key64, mix64
from megatron_ettin.data.sampler import BatchSizes

# of the tokens chosen for masking: share replaced by [MASK], share replaced by a random id
MASKED, RANDOM = 0.8, 0.1

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class MaskingCollator:
    """Maker of the inputs and labels of a row. They depend on the row, its objective, and these settings only."""

    row_objectives: tuple[str, ...]
    """Row objectives of the run's objective."""
    probability: float
    """Share of the tokens that are chosen for masking."""
    seed_key: int
    """Hash of (seed, phase)."""
    vocab_size: int
    """Number of token ids, from which random ones are drawn."""
    special_ids: tuple[int, ...]
    """Ids that are never masked."""
    mask_id: int | None
    """Id of [MASK]; None if no row objective masks."""

    def __call__(
        self, tokens: IntArray, lengths: IntArray, order_index: int, objective: str | None = None
    ) -> tuple[IntArray, IntArray]:
        """Return input ids [n] and labels [n] of a row, int64. A position that predicts nothing has the label -100.

        Args:
            tokens: token ids [n] of whole chunks.
            lengths: lengths of the chunks.
            order_index: order index of the row, on which the masks depend.
            objective: one of `row_objectives`; None if there is only one.
        """
        if objective is None:
            (objective,) = self.row_objectives
        ids = tokens.astype(np.int64)
        if objective == "clm":
            labels = np.append(ids[1:], IGNORE)
            labels[np.cumsum(lengths) - 1] = IGNORE
            return ids, labels
        if objective == "mlm":
            return self._mask(ids, order_index)
        inputs, labels = self._mask(ids, order_index, unmaskable=np.cumsum(lengths) - lengths)
        return inputs, np.append(labels[1:], IGNORE)

    def _mask(
        self, tokens: IntArray, order_index: int, unmaskable: IntArray | None = None
    ) -> tuple[IntArray, IntArray]:
        """Return masked inputs [n], and labels [n]: the original token at a chosen position, -100 at the others.

        Positions in `unmaskable` are never chosen.
        """
        row_key = mix64(np.array([order_index], dtype=np.uint64) ^ np.uint64(self.seed_key))
        draw = mix64(row_key + np.arange(len(tokens), dtype=np.uint64))
        chosen = _uniform(draw) < self.probability
        chosen &= ~np.isin(tokens, self.special_ids)
        if unmaskable is not None:
            chosen[unmaskable] = False
        replacement_draw = _uniform(mix64(draw ^ np.uint64(0x5851F42D4C957F2D)))
        random_ids = _uniform(mix64(draw ^ np.uint64(0x14057B7EF767814F))) * self.vocab_size
        # `make_collator` refuses a tokenizer without one
        assert self.mask_id is not None
        inputs = np.where(chosen & (replacement_draw < MASKED), self.mask_id, tokens)
        replaced = chosen & (replacement_draw >= MASKED) & (replacement_draw < MASKED + RANDOM)
        inputs = np.where(replaced, random_ids.astype(np.int64), inputs)
        return inputs, np.where(chosen, tokens, IGNORE)


def _uniform(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Turn the upper 53 bits of each uint64 into a float64 in [0, 1)."""
    uniform: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def make_collator(objective: str, corpus: BlendedDataset, probability: float, seed: int, phase: str) -> MaskingCollator:
    """Return the collator of an objective. Raises UserError if it needs a mask token and the tokenizer has none.

    Args:
        objective: the run's objective.
        corpus: the run's data, whose tokenizer has the token ids.
        probability: share of the tokens that are chosen for masking.
        seed: seed of the run.
        phase: phase of the run, which is part of every key.
    """
    if OBJECTIVES[objective].needs_mask_token and corpus.mask_id is None:
        raise UserError(f"objective {objective}: the dataset's tokenizer has no mask token; clm needs none")
    return MaskingCollator(
        OBJECTIVES[objective].row_objectives,
        probability,
        key64("mlm", seed, phase),
        corpus.vocab_size,
        tuple(corpus.special_ids),
        corpus.mask_id,
    )


def dataset_collator(config: Config, corpus: BlendedDataset) -> MaskingCollator:
    """Return the collator of a run on this dataset. Raises UserError if it does not fit the model or objective."""
    corpus.check_vocabulary(config.model.vocab_size)
    return make_collator(config.run.objective, corpus, config.data.mlm_probability, config.run.seed, config.run.phase)


@dataclass(frozen=True)
class ObjectiveMix:
    """Row objectives of the rows of any step."""

    row_objectives: tuple[str, ...]
    """The row objective of all rows; under a hybrid objective, the causal rows' objective, then the others'."""
    clm_fraction_schedule: Points = ()
    """Share of causal rows of a hybrid objective, as a function of the nominal tokens of the run so far."""
    seed: int = 0
    """Seed of the run."""
    phase: str = ""
    """Phase of the run."""
    mean_tokens_per_row: float = 1.0
    """Nominal number of tokens of a row."""

    @classmethod
    def of(cls, config: Config, mean_tokens_per_row: float) -> ObjectiveMix:
        """Return the mix of a run whose rows have `mean_tokens_per_row` nominal tokens."""
        row_objectives = OBJECTIVES[config.run.objective].row_objectives
        if len(row_objectives) == 1:
            return cls(row_objectives)
        points = parse_points(config.data.clm_fraction, "data.clm_fraction")
        return cls(row_objectives, points, config.run.seed, config.run.phase, mean_tokens_per_row)

    def causal_rows(self, sizes: BatchSizes, step: int) -> int:
        """Return the number of causal rows of `step`. A share of 2.4 rows gives 2 or 3, and 2.4 on average."""
        rows = sizes.size_at(step)
        if not self.clm_fraction_schedule:
            return rows if ROW_OBJECTIVES[self.row_objectives[0]].causal else 0
        share = share_at(self.clm_fraction_schedule, sizes.rows_before(step) * self.mean_tokens_per_row)
        draw = (key64("kinds", self.seed, self.phase, step) >> 11) * 2.0**-53
        return min(rows, int(share * rows + draw))

    def row_objective(self, slot: int, causal_rows: int) -> str:
        """Return the objective of the row in a slot of a step whose first `causal_rows` slots are causal."""
        return self.row_objectives[0] if slot < causal_rows else self.row_objectives[-1]
