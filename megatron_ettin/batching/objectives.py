"""Make inputs and labels of a row for its row objective (config/tables.py), and choose each row's objective.

`mlm` is the masking of transformers' DataCollatorForLanguageModeling (Bernoulli over non-special tokens; of the chosen
80 % become [MASK], half of the rest a uniformly random id, the others stay), its random numbers a hash of (seed,
phase, position in the data order, token): the same masks on every layout and after every resume.
`clm` shifts by one inside each chunk; the last token of a chunk predicts nothing.
`mntp` masks as `mlm` does, and the position before a masked token predicts it; a chunk's first token is never masked,
for nothing before it could.

Rows of a step come in the shuffled order of the data, so its first slots are as good a sample as any. Under a hybrid
objective they are the causal rows, and the others have masked tokens. Every micro-batch of any layout then has its
causal rows first, and all but one of a step hold rows of one kind. How many are causal is a pure function of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import IGNORE, OBJECTIVES, ROW_OBJECTIVES
from megatron_ettin.config.values import Points, parse_points, share_at
from megatron_ettin.data.blended_dataset import BlendedDataset
from megatron_ettin.data.hashing import key64, mix64
from megatron_ettin.data.sampler import BatchSizes

MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class MaskingCollator:
    """Everything that labels depend on besides the row, its position and its kind. `kinds` are the objective's."""

    kinds: tuple[str, ...]
    probability: float
    seed_key: int
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int | None

    def __call__(
        self, tokens: np.ndarray, lengths: np.ndarray, position: int, kind: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return input ids [n] and labels [n] of a row, int64; the label is -100 where there is none.

        Args:
            tokens: token ids [n] of whole chunks.
            lengths: lengths of the chunks.
            position: order index of the row, on which the masks depend.
            kind: one of `kinds`, needed where there are several.
        """
        if kind is None:
            (kind,) = self.kinds
        return LABELLERS[kind](self, tokens.astype(np.int64), lengths, position)


def make_collator(
    objective: str,
    probability: float,
    seed: int,
    phase: str,
    vocab_size: int,
    special_ids: Sequence[int],
    mask_id: int | None,
) -> MaskingCollator:
    """Return the collator of an objective. Raises UserError where it needs a mask token and the tokenizer has none."""
    if OBJECTIVES[objective].needs_mask_token and mask_id is None:
        raise UserError(f"objective {objective}: the dataset's tokenizer has no mask token; clm needs none")
    return MaskingCollator(
        OBJECTIVES[objective].row_objectives,
        probability,
        key64("mlm", seed, phase),
        vocab_size,
        tuple(special_ids),
        mask_id,
    )


def mask_tokens(
    rule: MaskingCollator, tokens: np.ndarray, lengths: np.ndarray, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mask tokens for masked language modelling; see the module docstring."""
    return _masked(rule, tokens, position, rule.special_ids, None)


def mask_next_tokens(
    rule: MaskingCollator, tokens: np.ndarray, lengths: np.ndarray, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mask tokens for next-token prediction: labels[i] is the masked token at i + 1 of the same chunk."""
    inputs, labels = _masked(rule, tokens, position, rule.special_ids, np.cumsum(lengths) - lengths)
    return inputs, np.append(labels[1:], IGNORE)


def _masked(
    rule: MaskingCollator, tokens: np.ndarray, position: int, kept_ids: Sequence[int], kept_places: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs with masks and the tokens chosen for them, never those of `kept_ids` or at `kept_places`."""
    row_key = mix64(np.array([position], dtype=np.uint64) ^ np.uint64(rule.seed_key))
    draw = mix64(row_key + np.arange(len(tokens), dtype=np.uint64))
    chosen = _uniform(draw) < rule.probability
    chosen &= ~np.isin(tokens, kept_ids)
    if kept_places is not None:
        chosen[kept_places] = False
    fate, word = mix64(draw ^ np.uint64(0x5851F42D4C957F2D)), mix64(draw ^ np.uint64(0x14057B7EF767814F))
    kind = _uniform(fate)
    # `make_collator` refuses a tokenizer without one
    assert rule.mask_id is not None
    inputs = np.where(chosen & (kind < MASKED), rule.mask_id, tokens)
    random_ids = (_uniform(word) * rule.vocab_size).astype(np.int64)
    inputs = np.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), random_ids, inputs)
    return inputs, np.where(chosen, tokens, IGNORE)


def shift_tokens(
    rule: MaskingCollator, tokens: np.ndarray, lengths: np.ndarray, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shift labels for causal language modelling: labels[i] is the token at i + 1 of the same chunk."""
    labels = np.append(tokens[1:], IGNORE)
    labels[np.cumsum(lengths) - 1] = IGNORE
    return tokens, labels


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Turn the upper 53 bits of each uint64 into a float64 in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


LABELLERS: dict[str, Callable[[MaskingCollator, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {
    "mlm": mask_tokens,
    "clm": shift_tokens,
    "mntp": mask_next_tokens,
}


def dataset_collator(config: Config, corpus: BlendedDataset, probability: float | None = None) -> MaskingCollator:
    """Return the collator of a run on this dataset. Raises UserError where the vocabularies differ."""
    corpus.check_vocabulary(config.model.vocab_size)
    chance = config.data.mlm_probability if probability is None else probability
    return make_collator(
        config.run.objective, chance, config.run.seed, config.run.phase, corpus.vocab_size, corpus.special_ids,
        corpus.mask_id,
    )  # fmt: skip


@dataclass(frozen=True)
class ObjectiveMix:
    """Row objectives of the rows of any step. `points` is a hybrid objective's causal share by nominal tokens."""

    kinds: tuple[str, ...]
    points: Points = ()
    seed: int = 0
    phase: str = ""
    mean_tokens_per_row: float = 1.0

    @classmethod
    def of(cls, config: Config, mean_tokens_per_row: float) -> ObjectiveMix:
        kinds = OBJECTIVES[config.run.objective].row_objectives
        if len(kinds) == 1:
            return cls(kinds)
        points = parse_points(config.data.clm_fraction, "data.clm_fraction")
        return cls(kinds, points, config.run.seed, config.run.phase, mean_tokens_per_row)

    def causal_rows(self, sizes: BatchSizes, step: int) -> int:
        """Return how many rows of `step` are causal: its first slots. 2.4 rows are 2 or 3, and 2.4 on average."""
        rows = sizes.size_at(step)
        if not self.points:
            return rows if ROW_OBJECTIVES[self.kinds[0]].causal else 0
        share = share_at(self.points, sizes.rows_before(step) * self.mean_tokens_per_row)
        draw = (key64("kinds", self.seed, self.phase, step) >> 11) * 2.0**-53
        return min(rows, int(share * rows + draw))

    def of_slot(self, slot: int, causal_rows: int) -> str:
        return self.kinds[0] if slot < causal_rows else self.kinds[-1]
