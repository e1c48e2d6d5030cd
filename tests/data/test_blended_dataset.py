"""Mixtures and the data order: proportions in every block, each row once an epoch, a pure function of the order
index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.api import iterate_rows
from megatron_ettin.base.errors import UserError
from megatron_ettin.config.resolve import parse
from megatron_ettin.data.blended_dataset import BlendedDataset, open_blended_dataset, open_run_dataset
from megatron_ettin.data.dataset import Dataset
from megatron_ettin.data.mixture import BLOCK_SLOTS, MixtureEntry, largest_remainder, parse_mixture
from tests.data.corpora import prepare_here, write_jsonl


def corpus_of(*entries: tuple[Dataset, float | None], **changes: Any) -> BlendedDataset:
    settings = {"seq_len": 256, "batching": "packed", "seed": 21, "phase": "pretrain", **changes}
    return open_blended_dataset([MixtureEntry(str(dataset.path), weight) for dataset, weight in entries], **settings)


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        ("a", [MixtureEntry("a")]),
        (["a", "b"], [MixtureEntry("a"), MixtureEntry("b")]),
        ([{"path": "a", "weight": 2}], [MixtureEntry("a", 2.0)]),
        (
            [{"path": "a", "tokens": "1.5B"}, {"path": "b", "tokens": 7}],
            [MixtureEntry("a", None, 1_500_000_000), MixtureEntry("b", None, 7)],
        ),
    ],
)
def test_parse_mixture_accepts_paths_weights_and_tokens(value: Any, entries: list[MixtureEntry]) -> None:
    assert parse_mixture(value) == entries


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "empty"),
        ([], "empty"),
        (3, "give a DATASET path"),
        ([""], r"data\.mixture\[0\]: an empty path"),
        (["a", 3], r"data\.mixture\[1\]: 3"),
        ([{"weight": 1}], r"data\.mixture\[0\]: no path"),
        ([{"path": "a", "wieght": 1}], "no key 'wieght' .did you mean 'weight'"),
        ([{"path": "a", "weight": -1}], r"\[0\]\.weight: -1"),
        ([{"path": "a", "weight": float("nan")}], r"\[0\]\.weight: nan"),
        ([{"path": "a", "weight": "x"}], r"\[0\]\.weight: 'x'"),
        ([{"path": "a", "tokens": 0}], r"\[0\]\.tokens: 0"),
        ([{"path": "a", "tokens": float("nan")}], r"\[0\]\.tokens: nan"),
        ([{"path": "a", "weight": 1, "tokens": 1}], "both weight and tokens"),
        ([{"path": "a", "weight": 1}, "b"], "entries with neither and weight"),
    ],
)
def test_parse_mixture_invalid_value_is_refused_in_one_line(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_mixture(value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_largest_remainder_counts_sum_to_block_within_one_slot(shares: list[float]) -> None:
    fractions = [share / sum(shares) for share in shares]
    counts = largest_remainder(fractions, BLOCK_SLOTS)
    assert sum(counts) == BLOCK_SLOTS
    assert all(abs(count - fraction * BLOCK_SLOTS) < 1 for count, fraction in zip(counts, fractions, strict=True))


def test_blended_dataset_block_proportions_follow_token_weights(prepared: Dataset, other: Dataset) -> None:
    corpus = corpus_of((prepared, 3.0), (other, 1.0))
    for block in (0, 7):
        positions = np.arange(block * BLOCK_SLOTS, (block + 1) * BLOCK_SLOTS)
        source, _, _ = corpus.locate(positions)
        assert np.bincount(source).tolist() == corpus.order.counts
    tokens = [
        count * plan.mean_tokens_per_row
        for count, plan in zip(corpus.order.counts, corpus.packing_indices, strict=True)
    ]
    assert abs(tokens[0] / sum(tokens) - 0.75) < 1e-4
    assert corpus.mean_tokens_per_row == pytest.approx(sum(tokens) / BLOCK_SLOTS)
    first = corpus.locate(np.arange(100))[0]
    assert 0 < first.sum() < 100  # no block begins with rows of a single source


def test_blended_dataset_epoch_reads_every_row_once(prepared: Dataset, other: Dataset) -> None:
    corpus = corpus_of((prepared, 1.0), (other, 2.0))
    source, row, epoch = corpus.locate(np.arange(3 * BLOCK_SLOTS))
    for i, plan in enumerate(corpus.packing_indices):
        for turn in range(3):
            rows = row[(source == i) & (epoch == turn)]
            assert sorted(rows.tolist()) == list(range(plan.num_rows))
    in_order = [row[(source == 0) & (epoch == turn)].tolist() for turn in range(2)]
    assert in_order[0] != in_order[1]  # each epoch has another order
    single = corpus_of((prepared, None))
    assert sorted(single.locate(np.arange(single.num_rows))[1].tolist()) == list(range(single.num_rows))


def test_locate_result_depends_only_on_position(prepared: Dataset, other: Dataset) -> None:
    one, two = (corpus_of((prepared, 1.0), (other, 1.0)) for _ in range(2))
    positions = np.array([10**15 + 3, 0, 9_999, 10_000, 123_456_789, 0])
    together = np.stack(one.locate(positions))
    two.locate(np.arange(30_000, 30_500))  # earlier calls must not matter
    apart = np.concatenate([np.stack(two.locate(positions[i : i + 1])) for i in reversed(range(6))], axis=1)
    assert np.array_equal(together, apart[:, ::-1])
    assert one.locate(5)[0].shape == ()
    with pytest.raises(IndexError, match="order index -1"):
        one.locate([-1])


def test_blended_dataset_packed_rows_equal_their_chunks(prepared: Dataset, other: Dataset) -> None:
    corpus = corpus_of((prepared, 1.0), (other, 1.0))
    rows = corpus.rows(np.arange(40))
    for position, row in enumerate(rows):
        again = corpus.row(position)
        assert np.array_equal(again.tokens, row.tokens)
        assert row.order_index == position
        assert row.tokens.ndim == 1
        assert len(row.tokens) == int(row.lengths.sum()) <= 256
        pieces = np.split(row.tokens, np.cumsum(row.lengths)[:-1])
        for chunk, piece in zip(row.chunks, pieces, strict=True):
            assert np.array_equal(piece, corpus.datasets[row.source].chunk(int(chunk)))
            assert (piece[0], piece[-1]) == (50281, 50282)
    assert corpus.token_counts(np.arange(40)).tolist() == [len(row.tokens) for row in rows]


def test_blended_dataset_padded_rows_are_truncated_and_keep_sep(prepared: Dataset) -> None:
    corpus = corpus_of((prepared, None), seq_len=100, batching="padded")
    rows = corpus.rows(np.arange(60))
    assert max(len(row.tokens) for row in rows) == 100
    for row in rows:
        chunk = prepared.chunk(int(row.chunks[0]))
        assert row.lengths.tolist() == [len(row.tokens)]
        assert row.tokens[-1] == 50282
        assert np.array_equal(row.tokens[:-1], chunk[: len(row.tokens) - 1])


def test_fingerprint_differs_for_every_setting_that_changes_the_order(prepared: Dataset, other: Dataset) -> None:
    same = corpus_of((prepared, 1.0), (other, 1.0))
    corpora = [
        same,
        corpus_of((prepared, 1.0), (other, 2.0)),
        corpus_of((other, 1.0), (prepared, 1.0)),
        corpus_of((prepared, 1.0), (other, 1.0), seed=22),
        corpus_of((prepared, 1.0), (other, 1.0), phase="decay"),
        corpus_of((prepared, 1.0), (other, 1.0), seq_len=257),
        corpus_of((prepared, 1.0), (other, 1.0), batching="padded"),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
    assert corpus_of((prepared, 10.0), (other, 10.0)).fingerprint == same.fingerprint


def test_open_run_corpus_with_data_skip_leaves_out_rows(prepared: Dataset) -> None:
    overrides = ["data.seq_len=256", f"data.mixture=[{prepared.path}]"]
    plain = parse("17m", "mlm", "pretrain", overrides=overrides)
    some = parse("17m", "mlm", "pretrain", overrides=[*overrides, "data.skip='3:5,7:8'"])
    left = [row for row in iterate_rows(plain, 0, 12) if row.order_index not in (3, 4, 7)]
    result = list(iterate_rows(some, 0, 9))
    assert [row.order_index for row in result] == [0, 1, 2, 5, 6, 8, 9, 10, 11]
    assert [row.tokens.tolist() for row in result] == [row.tokens.tolist() for row in left]
    corpora = [open_run_dataset(config) for config in (plain, some)]
    assert corpora[0].fingerprint != corpora[1].fingerprint
    assert corpora[0].fingerprint == corpora[1].unskipped_fingerprint


def test_blended_dataset_unusable_mixture_is_refused(
    prepared: Dataset, other: Dataset, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    with pytest.raises(UserError, match=f"{other.path} would get .* of the rows"):
        corpus_of((prepared, 1.0), (other, 1e-9))
    source = write_jsonl(tmp_path / "a.jsonl", 5)
    out = tmp_path / "small"
    arguments = ("--out", out, "--tokenizer", tiny_tokenizer, "--chunk-tokens", 128, "--workers", 1)
    assert prepare_here(source, *arguments) == 0
    with pytest.raises(UserError, match=f"{prepared.path} has tokenizer ettin .* and {out} has"):
        open_blended_dataset([MixtureEntry(str(prepared.path)), MixtureEntry(str(out))], 256, "packed", 1, "pretrain")
    with pytest.raises(UserError, match="no such directory"):
        open_blended_dataset([MixtureEntry(str(tmp_path / "absent"))], 256, "packed", 1, "pretrain")
