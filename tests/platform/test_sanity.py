"""Products of the sanity check are judged by their results."""

from __future__ import annotations

import torch

from megatron_ettin.platform.sanity import products, wrong_rows


def test_wrong_rows_detects_wrong_matrix_products() -> None:
    from megatron_ettin.platform.device import Platform

    done = products(Platform(torch.device("cpu"), "gloo", "cpu"), 0.0, side=64)
    assert done.error is None
    assert done.flops > 0
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    assert wrong_rows(a, b, a @ b) is None
    assert "is off by" in (wrong_rows(a, b, a @ b + 10) or "")
    assert wrong_rows(a, b, torch.full((64, 64), float("nan"))) is not None
