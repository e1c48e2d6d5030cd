"""Inputs and labels of a row, for each kind of row (config/tables.py).

`mlm` is the masking of transformers' DataCollatorForLanguageModeling (Bernoulli over non-special tokens; of the chosen
80 % become [MASK], half of the rest a uniformly random id, the others stay), its random numbers a hash of (seed,
phase, position in the data order, token): the same masks on every layout and after every resume.
`clm` shifts by one inside each chunk; the last token of a chunk predicts nothing.
`mntp` masks as `mlm` does, and the position before a masked token predicts it; a chunk's first token is never masked,
for nothing before it could.

Which rows of a step are read causally and which with masked tokens.

Rows of a step come in the shuffled order of the data, so its first slots are as good a sample as any: they are the
causal ones. Every micro-batch of any layout then has its causal rows first, and all but one of a step hold rows of one
kind. How many there are is a pure function of the step."""

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
    """Everything that labels depend on besides the row, its position and its kind. `kinds`: of the objective."""

    kinds: tuple[str, ...]
    probability: float
    seed_key: int
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int | None

    def __call__(
        self, tokens: np.ndarray, lengths: np.ndarray, position: int, kind: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """tokens [n] of whole chunks with these lengths -> input ids [n], labels [n] (int64, -100 where none).
        `kind`: one of `kinds`, needed where there are several."""
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
    """The labeller of a run. Raises UserError where the tokenizer has no mask token and the objective needs one."""
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
    """Masked language modelling; see the module docstring."""
    return _masked(rule, tokens, position, rule.special_ids, None)


def mask_next_tokens(
    rule: MaskingCollator, tokens: np.ndarray, lengths: np.ndarray, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Masked next-token prediction: labels[i] is the masked token at i + 1 of the same chunk."""
    inputs, labels = _masked(rule, tokens, position, rule.special_ids, np.cumsum(lengths) - lengths)
    return inputs, np.append(labels[1:], IGNORE)


def _masked(
    rule: MaskingCollator, tokens: np.ndarray, position: int, kept_ids: Sequence[int], kept_places: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with masks, and the tokens that were chosen; those of `kept_ids` and at `kept_places` never are."""
    row_key = mix64(np.array([position], dtype=np.uint64) ^ np.uint64(rule.seed_key))
    draw = mix64(row_key + np.arange(len(tokens), dtype=np.uint64))
    chosen = _uniform(draw) < rule.probability
    chosen &= ~np.isin(tokens, kept_ids)
    if kept_places is not None:
        chosen[kept_places] = False
    fate, word = mix64(draw ^ np.uint64(0x5851F42D4C957F2D)), mix64(draw ^ np.uint64(0x14057B7EF767814F))
    kind = _uniform(fate)
    assert rule.mask_id is not None  # `labeller` has seen to it
    inputs = np.where(chosen & (kind < MASKED), rule.mask_id, tokens)
    random_ids = (_uniform(word) * rule.vocab_size).astype(np.int64)
    inputs = np.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), random_ids, inputs)
    return inputs, np.where(chosen, tokens, IGNORE)


def shift_tokens(
    rule: MaskingCollator, tokens: np.ndarray, lengths: np.ndarray, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Causal language modelling: labels[i] is the token at i + 1 of the same chunk."""
    labels = np.append(tokens[1:], IGNORE)
    labels[np.cumsum(lengths) - 1] = IGNORE
    return tokens, labels


def _uniform(bits: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


LABELLERS: dict[str, Callable[[MaskingCollator, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {
    "mlm": mask_tokens,
    "clm": shift_tokens,
    "mntp": mask_next_tokens,
}


def dataset_collator(config: Config, corpus: BlendedDataset, probability: float | None = None) -> MaskingCollator:
    """The labeller of a run on this corpus. Raises UserError where the vocabularies differ."""
    corpus.check_vocabulary(config.model.vocab_size)
    chance = config.data.mlm_probability if probability is None else probability
    return make_collator(
        config.run.objective, chance, config.run.seed, config.run.phase, corpus.vocab_size, corpus.special_ids,
        corpus.mask_id,
    )  # fmt: skip


@dataclass(frozen=True)
class ObjectiveMix:
    """Kinds of the rows of any step. `points`: the causal share by nominal tokens, of a hybrid objective."""

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
        """Rows of `step` that are causal: slots 0, 1, ... A share of 2.4 rows is 2 or 3 of them, 2.4 on average."""
        rows = sizes.size_at(step)
        if not self.points:
            return rows if ROW_OBJECTIVES[self.kinds[0]].causal else 0
        share = share_at(self.points, sizes.rows_before(step) * self.mean_tokens_per_row)
        draw = (key64("kinds", self.seed, self.phase, step) >> 11) * 2.0**-53
        return min(rows, int(share * rows + draw))

    def of_slot(self, slot: int, causal_rows: int) -> str:
        return self.kinds[0] if slot < causal_rows else self.kinds[-1]
