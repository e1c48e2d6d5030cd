"""The mask depends on (seed, step, layer, slot, token, channel) alone, and has the statistics of independent draws."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ettin.model.boundaries import ChunkBoundaries
from megatron_ettin.model.dropout import keep_mask, keep_mask_by_channel, step_key, token_keys
from megatron_ettin.model.packed import PackedRows
from tests.model.rows import pack_rows


def mask(
    slots: list[int], step: int = 0, layer: int = 1, seed: int = 21, channels: int = 256, p: float = 0.1
) -> torch.Tensor:
    packed = pack_rows([[128]] * len(slots), 128, slots=slots, dropout_key=step_key(seed, "pretrain", step))
    return keep_mask(token_keys(packed, layer, 0, 128 * len(slots)), channels, round(p * 65536))


def test_dropout_mask_of_row_is_same_in_any_micro_batch() -> None:
    together = mask([4, 5, 6, 7])
    apart = torch.cat([mask([4, 5]), mask([6]), mask([7])])
    assert torch.equal(together, apart)


def test_dropout_keys_sequence_parallel_slices_join_to_whole() -> None:
    packed = pack_rows([[128]] * 2, 128, slots=[0, 1], dropout_key=5)
    whole = token_keys(packed, 3, 0, 256)
    assert torch.equal(whole, torch.cat([token_keys(packed, 3, first, 128) for first in (0, 128)]))


def test_dropout_keys_context_parallel_slices_join_to_whole() -> None:
    rows = [[128]] * 2
    whole = token_keys(pack_rows(rows, 128, slots=[0, 1], dropout_key=5), 3, 0, 256).view(2, 128)
    boundaries = [ChunkBoundaries.of(rows, 128, [0, 1], context=(rank, 2)) for rank in (0, 1)]
    slices = [token_keys(PackedRows.of(host, dropout_key=5), 3, 0, 128) for host in boundaries]
    assert torch.equal(whole, torch.cat([one.view(2, 64) for one in slices], dim=1))


def test_token_keys_of_flat_rows_equal_those_of_rows_of_their_own() -> None:
    lengths, slots = [40, 9, 64], [7, 8, 11]
    apart = token_keys(pack_rows([[n] for n in lengths], 64, slots=slots, dropout_key=5), 3, 0, 192).view(3, 64)
    expected = torch.cat([apart[i, :n] for i, n in enumerate(lengths)])
    for cp in (1, 2):
        boundaries = [ChunkBoundaries.of([lengths], 128, slots, context=(rank, cp), flat=True) for rank in range(cp)]
        packs = [PackedRows.of(host, dropout_key=5) for host in boundaries]
        size = 128 // cp
        # two calls a rank, as with sequence parallelism
        calls = itertools.product(packs, (0, size // 2))
        actual = torch.cat([token_keys(packed, 3, first, size // 2) for packed, first in calls])
        assert torch.equal(actual[: sum(lengths)], expected)


@pytest.mark.parametrize("channels", [64, 63, 2])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_keep_mask_by_channel_equals_keep_mask(channels: int, p: float) -> None:
    keys = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    masks = [make(keys, channels, round(p * 65536)) for make in (keep_mask, keep_mask_by_channel)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_mask_rate_is_p_with_no_favoured_token_or_channel(p: float) -> None:
    kept = mask(list(range(32)), p=p).double()
    n = kept.numel()
    assert abs(kept.mean().item() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / 65536
    # no token and no channel is favoured
    for dim in (0, 1):
        means = kept.mean(dim)
        expected = (p * (1 - p) / kept.shape[dim]) ** 0.5
        assert means.std().item() == pytest.approx(expected, rel=0.15)


def test_dropout_masks_of_other_step_layer_or_seed_are_uncorrelated() -> None:
    """Masks of another step, layer, seed, slot, neighbouring token or channel agree no more than by chance."""
    base = mask([0, 1, 2, 3]).double() - 0.9
    others = [mask([0, 1, 2, 3], step=1), mask([0, 1, 2, 3], layer=2), mask([0, 1, 2, 3], seed=22), mask([4, 5, 6, 7])]
    pairs = [(base, other.double() - 0.9) for other in others]
    pairs += [(base[1:], base[:-1]), (base[:, 1:], base[:, :-1]), (base[:, ::2], base[:, 1::2])]
    for a, b in pairs:
        correlation = (a * b).mean().item() / 0.09
        assert abs(correlation) < 5 / a.numel() ** 0.5
