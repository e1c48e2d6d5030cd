"""The simulated pipeline against its closed form, and core's order of passes."""

from __future__ import annotations

import pytest

from megatron_ettin.plan.pipeline import BACKWARD, FORWARD, order_of_passes, simulate


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 5), (2, 8), (4, 8), (8, 64), (4, 2)])
def test_simulate_1f1b_bubble_matches_the_formula(ranks: int, micro_batches: int) -> None:
    seconds, busy = simulate([1.0] * ranks, [2.0] * ranks, micro_batches, ranks)
    assert seconds == pytest.approx(3.0 * (micro_batches + ranks - 1))
    assert 1 - max(busy) / seconds == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 7, 16), (2, 4, 2)])
def test_simulate_interleaved_bubble_is_divided_by_model_chunks(ranks: int, chunks: int, micro_batches: int) -> None:
    stages = ranks * chunks
    seconds, _ = simulate([1.0 / chunks] * stages, [2.0 / chunks] * stages, micro_batches, ranks)
    assert seconds == pytest.approx(3.0 * (micro_batches + (ranks - 1) / chunks))


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(4, 1, 6), (2, 3, 4)])
def test_order_of_passes_runs_each_pass_once_forward_first(ranks: int, chunks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        order = order_of_passes(rank, ranks, chunks, micro_batches)
        wanted = {
            (direction, c, m) for direction in (FORWARD, BACKWARD) for c in range(chunks) for m in range(micro_batches)
        }
        assert len(order) == len(wanted)
        assert set(order) == wanted
        for chunk in range(chunks):
            for micro_batch in range(micro_batches):
                assert order.index((FORWARD, chunk, micro_batch)) < order.index((BACKWARD, chunk, micro_batch))


def test_simulate_slowest_stage_sets_the_time() -> None:
    even, _ = simulate([1.0] * 4, [2.0] * 4, 32, 4)
    uneven, _ = simulate([1.0, 1.0, 1.0, 1.5], [2.0, 2.0, 2.0, 3.0], 32, 4)
    with_hops, _ = simulate([1.0] * 4, [2.0] * 4, 32, 4, hop_seconds=0.1)
    assert uneven > 4.5 * 32 > even
    assert with_hops > even


def test_order_of_passes_interleaved_partial_group_is_refused() -> None:
    with pytest.raises(ValueError, match="5 micro-batches are no multiple of 2"):
        order_of_passes(0, 2, 2, 5)
