"""Run one rank of a large layout, alone. torch's fake process groups complete at once without data; everything else is
the real code. Prints, as JSON, the bytes that the rank holds and those that it passes to its groups in a step. Runs in
a fork of the test session's server (tests/forkserver.py)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ettin.batching.batches import Batches
from megatron_ettin.bench.synthetic import SyntheticRows
from megatron_ettin.config.resolve import parse
from megatron_ettin.parallel.groups import axes_of_groups
from megatron_ettin.platform import detect
from megatron_ettin.platform.trackers import CommVolumeTracker, PeakMemoryTracker
from megatron_ettin.train.setup import setup_training
from megatron_ettin.train.step import run_micro_batches


@contextlib.contextmanager
def no_span(_: str) -> Iterator[None]:
    yield


def main(world: int, rank: int, size: str, arguments: list[str]) -> None:
    torch.manual_seed(0)
    config = parse(size, "mlm", "pretrain", overrides=arguments)
    platform = detect("cpu", 0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    empty = PeakMemoryTracker().bytes
    train_state = setup_training(config, platform, world)
    assert train_state.optimizer is not None
    held = PeakMemoryTracker().bytes - empty
    corpus = SyntheticRows(config.data.seq_len, 200.0, config.model.vocab_size)
    batches = Batches.of(config, corpus, train_state.layout, platform.device)
    count = batches.host.count(0)
    traffic = CommVolumeTracker(axes_of_groups())
    with traffic.track(no_span), PeakMemoryTracker() as live:
        train_state.optimizer.zero_grad()
        run_micro_batches(train_state, batches.step(0), count, training=True)
        train_state.optimizer.prepare()
        train_state.optimizer.update(1e-4)
        train_state.optimizer.norm()
    sent: dict[str, dict[str, int]] = {}
    for (axis, method), count_bytes in traffic.bytes_sent.items():
        sent.setdefault(axis, {})[method] = count_bytes
    parameters = sum(one.numel() for chunk in train_state.model_chunks for one in chunk.parameters())
    print(json.dumps({"parameters": parameters, "held": held, "peak": live.peak_bytes - empty, "sent": sent}))
