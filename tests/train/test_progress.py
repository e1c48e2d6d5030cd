"""Totals of a step are reduced over micro-batches and ranks as their reduction says."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ettin.train import progress
from megatron_ettin.train.progress import StepTotals


def reduced(monkeypatch: pytest.MonkeyPatch, *ranks: StepTotals) -> dict[str, float]:
    """Return the totals that every rank gets from an all-reduce over `ranks`."""
    own: list[list[float]] = []
    monkeypatch.setattr(progress, "all_reduce_sum", lambda values, device: own.append(values) or values)
    for rank, one in enumerate(ranks):
        one.all_reduce(rank, torch.device("cpu"))
    sums = [sum(values) for values in zip(*own, strict=True)]
    monkeypatch.setattr(progress, "all_reduce_sum", lambda values, device: sums)
    return ranks[0].all_reduce(0, torch.device("cpu"))


def test_step_totals_numbers_and_tensors_of_micro_batches_are_summed() -> None:
    step = StepTotals()
    for value in (1.5, torch.tensor(2.0), torch.tensor(4.0, dtype=torch.float64)):
        step.add("loss", value)
    step.add("labels", 3)
    assert (step.read()["loss"], step.read()["labels"], step.read()["tokens"]) == (7.5, 3.0, 0.0)


def test_step_totals_mean_counts_values_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, empty = StepTotals(), StepTotals(), StepTotals()
    for one, values in ((first, [1.0, 2.0]), (second, [6.0]), (empty, [None])):
        for value in values:
            one.add("z_loss", value, reduce="mean")
    assert reduced(monkeypatch, first, second, empty)["z_loss"] == 3.0


def test_step_totals_mean_of_no_value_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = StepTotals()
    empty.add("z_loss", None, reduce="mean")
    assert math.isnan(reduced(monkeypatch, empty)["z_loss"])


@pytest.mark.parametrize("other", [2.0, float("nan")])
def test_step_totals_rank_zero_value_wins_unless_one_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, other: float
) -> None:
    ranks = [StepTotals(), StepTotals()]
    for one, norm in zip(ranks, (1.0, other), strict=True):
        one.add("grad_norm", norm, reduce="rank_zero")
    norm = reduced(monkeypatch, *ranks)["grad_norm"]
    assert norm == 1.0 if math.isfinite(other) else math.isnan(norm)


def test_step_totals_other_reduction_of_same_figure_is_refused() -> None:
    step = StepTotals()
    step.add("z_loss", 1.0)
    with pytest.raises(ValueError, match="z_loss: was added with reduce='sum', now with 'mean'"):
        step.add("z_loss", 1.0, reduce="mean")
