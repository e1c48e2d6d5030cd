"""Chunking: no token is used twice or lost except in dropped last pieces, sizes are in bounds, the recipe's numbers
hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megatron_ettin.base.errors import UserError
from megatron_ettin.prepare.chunking import ChunkRule, add_special_tokens, chunk_lengths, chunk_rule, piece_bounds


@st.composite
def rules(draw: st.DrawFn) -> ChunkRule:
    chunk = draw(st.integers(16, 300))
    least = draw(st.integers(0, chunk - 2))
    return chunk_rule(chunk, least, draw(st.integers(0, least)))


@settings(deadline=None)
@given(rule=rules(), num_tokens=st.integers(1, 2_000), key=st.text(max_size=4))
def test_piece_bounds_any_rule_covers_all_but_dropped_tail_within_size(
    rule: ChunkRule, num_tokens: int, key: str
) -> None:
    bounds = piece_bounds(num_tokens, rule, key)
    size = rule.chunk_tokens - 2
    assert bounds[0][0] == 0
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))  # no gap, none twice
    assert all(0 < end - start <= size for start, end in bounds)
    assert all(end - start == size for start, end in bounds[:-2])
    dropped = num_tokens - bounds[-1][1]
    assert dropped == 0 or (dropped < rule.skip_tokens and dropped == num_tokens % size and num_tokens > size)
    if len(bounds) > 1 and not dropped:  # back-filled, so at least as long as the remainder
        assert bounds[-1][1] - bounds[-1][0] >= ((num_tokens - 1) % size) + 1 >= rule.skip_tokens
    assert bounds == piece_bounds(num_tokens, rule, key)


def test_piece_bounds_many_keys_move_boundary_over_its_whole_range() -> None:
    rule = chunk_rule(1_024)
    lengths = [end - start for key in range(3_000) for start, end in piece_bounds(1_022 + 200, rule, str(key))[1:]]
    # takes 0 to 1022 - 200 - 1 tokens from the piece before, the range of the published script
    assert (min(lengths), max(lengths)) == (200, 1_021)
    assert abs(np.mean(lengths) - 610.5) < 15


def test_chunk_rule_and_piece_bounds_defaults_match_recipe() -> None:
    assert chunk_rule(1_024) == ChunkRule(1_024, 512, 128)
    assert chunk_rule(8_192) == ChunkRule(8_192, 512, 32)
    assert chunk_rule(256) == ChunkRule(256, 128, 32)
    assert piece_bounds(100, chunk_rule(1_024), "") == [(0, 100)]  # a short document is kept
    assert piece_bounds(1_022 + 127, chunk_rule(1_024), "") == [(0, 1_022)]  # 127 tokens are dropped
    assert piece_bounds(1_022 + 600, chunk_rule(1_024), "") == [(0, 1_022), (1_022, 1_622)]


def test_add_special_tokens_puts_cls_and_sep_around_every_piece() -> None:
    out = add_special_tokens(np.arange(5, dtype=np.uint16), [(0, 2), (2, 5)], cls_id=90, sep_id=91)
    assert out.tolist() == [90, 0, 1, 91, 90, 2, 3, 4, 91]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((15,), "--chunk-tokens: 15; at least 16"),
        ((64, 63), "--min-chunk-tokens: 63"),
        ((64, 10, 11), "--skip-tokens: 11"),
    ],
)
def test_chunk_rule_impossible_sizes_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chunk_rule(*arguments)


@pytest.mark.parametrize(
    ("end_token", "expected"),
    [
        ("every", [90, 0, 1, 91, 90, 2, 3, 4, 91]),
        ("last", [90, 0, 1, 90, 2, 3, 4, 91]),
        ("none", [90, 0, 1, 90, 2, 3, 4]),
    ],
)
def test_add_special_tokens_end_token_setting_decides_which_pieces_get_sep(end_token: str, expected: list[int]) -> None:
    bounds = [(0, 2), (2, 5)]
    out = add_special_tokens(np.arange(5, dtype=np.uint16), bounds, cls_id=90, sep_id=91, end_token=end_token)
    assert out.tolist() == expected
    assert sum(chunk_lengths(bounds, end_token)) == len(expected)
