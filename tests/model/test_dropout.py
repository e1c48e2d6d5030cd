"""The mask depends on (seed, step, layer, slot, token, channel) and on nothing else; its statistics are a coin's."""

from __future__ import annotations

import pytest
import torch

from megatron_ettin.model.dropout import keep_mask, step_key
from megatron_ettin.model.packed import pack_rows


def mask(
    slots: list[int], step: int = 0, layer: int = 1, seed: int = 21, channels: int = 256, p: float = 0.1
) -> torch.Tensor:
    packed = pack_rows([[128]] * len(slots), 128, slots=slots, dropout_key=step_key(seed, "pretrain", step))
    return keep_mask(packed, layer, 0, 128 * len(slots), channels, p)


def test_rows_have_the_same_mask_in_any_micro_batch() -> None:
    together = mask([4, 5, 6, 7])
    apart = torch.cat([mask([4, 5]), mask([6]), mask([7])])
    assert torch.equal(together, apart)


def test_a_sequence_parallel_slice_is_a_slice_of_the_mask() -> None:
    packed = pack_rows([[128]] * 2, 128, slots=[0, 1], dropout_key=5)
    whole = keep_mask(packed, 3, 0, 256, 64, 0.1)
    halves = [keep_mask(packed, 3, first, 128, 64, 0.1) for first in (0, 128)]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_rate(p: float) -> None:
    kept = mask(list(range(32)), p=p).double()
    n = kept.numel()
    assert abs(kept.mean().item() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / 65536
    for dim in (0, 1):  # no token and no channel is favoured
        means = kept.mean(dim)
        expected = (p * (1 - p) / kept.shape[dim]) ** 0.5
        assert means.std().item() == pytest.approx(expected, rel=0.15)


def test_masks_are_independent() -> None:
    """Another step, layer, seed, neighbouring token or channel: agreement is chance's."""
    base = mask([0, 1, 2, 3]).double() - 0.9
    others = [mask([0, 1, 2, 3], step=1), mask([0, 1, 2, 3], layer=2), mask([0, 1, 2, 3], seed=22), mask([4, 5, 6, 7])]
    pairs = [(base, other.double() - 0.9) for other in others]
    pairs += [(base[1:], base[:-1]), (base[:, 1:], base[:, :-1]), (base[:, ::2], base[:, 1::2])]
    for a, b in pairs:
        correlation = (a * b).mean().item() / 0.09
        assert abs(correlation) < 5 / a.numel() ** 0.5
