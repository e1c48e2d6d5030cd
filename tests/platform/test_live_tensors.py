"""Counting the memory that tensors hold."""

from __future__ import annotations

import gc

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from megatron_ettin.platform.live_tensors import LiveTensors


def test_what_lives_is_counted_once() -> None:
    gc.collect()
    before = LiveTensors().bytes
    whole = torch.zeros(1000)
    part = whole[10:20]
    assert LiveTensors().bytes - before == 4000 and part.numel() == 10


def test_a_peak_is_of_what_lives_at_once() -> None:
    with LiveTensors() as live:
        before = live.bytes
        for _ in range(3):
            torch.zeros(1000)
        kept = torch.zeros(500)
        assert live.bytes - before == 2000 and kept.numel() == 500
    assert live.peak_bytes - before == 4000


def test_what_a_compiler_left_is_not() -> None:
    """`ettin bench` measures a run that compiles before one that does not, in one process."""
    environment = ShapeEnv()
    mode, dynamic = FakeTensorMode(shape_env=environment), StatelessSymbolicContext([DimDynamic.DYNAMIC])
    gc.collect()
    before = LiveTensors().bytes
    symbol = mode.from_tensor(torch.zeros(1000), symbolic_context=dynamic)
    gc.collect()
    after = LiveTensors().bytes
    assert isinstance(symbol.shape[0], torch.SymInt)
    assert type(after) is int and after == before and not environment.guards
