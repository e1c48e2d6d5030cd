"""Masking: rates by count, masks that depend on the order index alone, labels that never cross a chunk, and the share
of causal rows, on average and at every point of its schedule."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.batching.objectives import ObjectiveMix, make_collator
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.tables import IGNORE
from megatron_ettin.config.values import parse_points
from megatron_ettin.data.sampler import BatchSizes

SPECIAL, MASK, VOCAB_SIZE = (50_280, 50_281, 50_282, 50_283, 50_284), 50_284, 50_368
VOCABULARY = SimpleNamespace(vocab_size=VOCAB_SIZE, special_ids=SPECIAL, mask_id=MASK)


def row(position: int, n: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(position)
    lengths = np.array([n // 4, n // 2, n - n // 4 - n // 2])
    tokens = draw.integers(10, 50_000, n).astype(np.uint16)
    ends = np.cumsum(lengths)
    tokens[ends - lengths], tokens[ends - 1] = 50_281, 50_282
    return tokens, lengths


def masked(probability: float, rows: int, seed: int = 21) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    label = make_collator("mlm", VOCABULARY, probability, seed, "pretrain")
    return [(row(i)[0].astype(np.int64), *label(*row(i), i)) for i in range(rows)]


@pytest.mark.parametrize("probability", [0.30, 0.15])
def test_mlm_masks_at_given_probability_split_80_10_10(probability: float) -> None:
    """Non-special tokens are chosen by Bernoulli draws, 80 % masked, 10 % random, 10 % kept: within four sigmas."""
    tokens, inputs, labels = (np.concatenate(part) for part in zip(*masked(probability, 150), strict=True))
    chosen, ordinary = labels != IGNORE, ~np.isin(tokens, SPECIAL)
    assert not chosen[~ordinary].any()
    assert (labels[chosen] == tokens[chosen]).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    n, k = int(ordinary.sum()), int(chosen.sum())
    assert abs(k / n - probability) < 4 * (probability * (1 - probability) / n) ** 0.5
    for rate, count in ((0.8, (inputs[chosen] == MASK).sum()), (0.1, (inputs[chosen] == tokens[chosen]).sum())):
        assert abs(count / k - rate) < 4 * (rate * (1 - rate) / k) ** 0.5
    drawn = inputs[chosen & (inputs != MASK) & (inputs != tokens)]
    assert drawn.min() >= 0
    assert drawn.max() < VOCAB_SIZE
    assert abs(drawn.mean() / VOCAB_SIZE - 0.5) < 4 * (1 / 12 / len(drawn)) ** 0.5


def test_mlm_masks_are_determined_by_seed_and_row_index() -> None:
    again = list(zip(masked(0.3, 5), masked(0.3, 5), strict=True))
    assert all((a[1] == b[1]).all() for a, b in again)
    assert all((a[2] == b[2]).all() for a, b in again)
    assert any((a[2] != b[2]).any() for a, b in zip(masked(0.3, 5), masked(0.3, 5, seed=22), strict=True))
    label = make_collator("mlm", VOCABULARY, 0.3, 21, "pretrain")
    tokens, lengths = row(0)
    at = [label(tokens, lengths, position)[1] != IGNORE for position in (0, 1)]
    overlap = (at[0] & at[1]).mean()
    assert abs(overlap - 0.09) < 0.04  # neighbours in the order are independent


def test_mlm_mask_of_chunk_is_independent_of_later_chunks() -> None:
    label = make_collator("mlm", VOCABULARY, 0.3, 21, "pretrain")
    tokens, lengths = row(3)
    whole = label(tokens, lengths, 3)
    first = label(tokens[: lengths[0]], lengths[:1], 3)
    assert all((a[: lengths[0]] == b).all() for a, b in zip(whole, first, strict=True))


def test_clm_labels_are_shifted_inside_chunks() -> None:
    label = make_collator("clm", VOCABULARY, 0.0, 21, "pretrain")
    tokens, lengths = row(1)
    inputs, labels = label(tokens, lengths, 1)
    assert (inputs == tokens).all()
    ends = set((np.cumsum(lengths) - 1).tolist())
    for i in range(len(tokens)):
        assert labels[i] == (IGNORE if i in ends else tokens[i + 1])


def test_mntp_labels_are_mlm_labels_shifted_by_one() -> None:
    """Masks are those of mlm except on a chunk's first token; labels are shifted by one inside the chunk."""
    # chunks without special tokens, so that a chunk's first token can be masked
    vocabulary = SimpleNamespace(vocab_size=VOCAB_SIZE, special_ids=(), mask_id=MASK)
    rule = make_collator("mntp", vocabulary, 0.3, 21, "pretrain")
    plain = make_collator("mlm", vocabulary, 0.3, 21, "pretrain")
    firsts = 0
    for position in range(40):
        tokens, lengths = row(position)
        starts = np.cumsum(lengths) - lengths
        (inputs, labels), (masked_inputs, masked_labels) = (label(tokens, lengths, position) for label in (rule, plain))
        firsts += int((masked_labels[starts] != IGNORE).sum())
        masked_labels[starts] = IGNORE
        masked_inputs[starts] = tokens[starts]
        assert (inputs == masked_inputs).all()
        assert (labels[:-1] == masked_labels[1:]).all()
        assert labels[-1] == IGNORE
    assert firsts > 10  # otherwise no first token would have been masked and nothing tested


def test_mlm_tokenizer_without_mask_token_is_refused() -> None:
    with pytest.raises(UserError, match="no mask token"):
        make_collator(
            "mlm", SimpleNamespace(vocab_size=VOCAB_SIZE, special_ids=SPECIAL, mask_id=None), 0.3, 21, "pretrain"
        )


SIZES = BatchSizes((8,), (0,))


def hybrid_mix(points: str, **changes: object) -> ObjectiveMix:
    return ObjectiveMix(("clm", "mlm"), parse_points(points, "k"), 21, "pretrain", 100.0, **changes)  # type: ignore[arg-type]


def test_objective_mix_pure_objective_has_all_or_no_causal_rows() -> None:
    assert ObjectiveMix(("clm",)).causal_rows(SIZES, 3) == 8
    assert ObjectiveMix(("mlm",)).causal_rows(SIZES, 3) == ObjectiveMix(("mntp",)).causal_rows(SIZES, 3) == 0


def test_objective_mix_fractional_row_is_rounded_at_random_by_seed() -> None:
    rule = hybrid_mix("0.3")
    counts = [rule.causal_rows(SIZES, step) for step in range(4000)]
    assert set(counts) == {2, 3}
    assert sum(counts) / len(counts) == pytest.approx(2.4, abs=4 * (0.24 / 4000) ** 0.5)
    again, other = hybrid_mix("0.3"), dataclasses.replace(rule, seed=22)
    assert counts == [again.causal_rows(SIZES, step) for step in range(4000)]
    assert counts != [other.causal_rows(SIZES, step) for step in range(4000)]


def test_objective_mix_causal_rows_follow_share_schedule() -> None:
    # nominal tokens: ten steps of 8 rows of 100
    rule = hybrid_mix("0:1,8000:0")
    counts = [rule.causal_rows(SIZES, step) for step in range(12)]
    assert counts[0] == 8
    assert counts[10:] == [0, 0]
    assert all(abs(count - 8 * (1 - step / 10)) < 1 for step, count in enumerate(counts[:10]))


def test_clm_fraction_of_non_hybrid_or_above_one_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.clm_fraction: needs objective hybrid, hybrid_mntp; all rows of mlm are alike"
    ):
        parse("17m", "mlm", "pretrain", overrides=["data.clm_fraction=0.5"])
    with pytest.raises(UserError, match=r"data\.clm_fraction: 2"):
        parse("17m", "hybrid", "pretrain", overrides=["data.clm_fraction=2"])
    assert parse("17m", "hybrid", "pretrain").data.clm_fraction == 0.5
