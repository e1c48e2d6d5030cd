"""Logits of a checkpoint for given tokens, in one process: what exports are compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ettin import parallel
from megatron_ettin.config.schema import CheckpointConfig, Config, ParallelConfig, PrecisionConfig
from megatron_ettin.model.packed import pack_rows
from megatron_ettin.platform.rendezvous import leave
from megatron_ettin.train import resume
from megatron_ettin.train.assembly import Machine
from megatron_ettin.train.loop import machine_alone


def alone_on_cpu(config: Config) -> Config:
    """The same model for one process in fp32 on the CPU."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        precision=PrecisionConfig("fp32"),
        checkpoint=CheckpointConfig(every_tokens=None),
        run=dataclasses.replace(config.run, device="cpu"),
    )


@contextlib.contextmanager
def alone(checkpoint: Path) -> Iterator[Machine]:
    """The checkpoint's whole model, not loaded yet, in this process; its groups are gone afterwards."""
    machine = machine_alone(alone_on_cpu(resume.checkpoint_config(checkpoint)))
    try:
        yield machine
    finally:
        parallel.destroy()
        leave()


def logits_of(checkpoint: Path, token_lists: list[list[int]]) -> list[torch.Tensor]:
    """fp32 logits [n, vocabulary] of each list of n token ids, every list a chunk of its own."""
    with alone(checkpoint) as machine, torch.no_grad():
        resume.load(machine, checkpoint, with_optimizer=False)
        model = machine.chunks[0].eval()
        return [model(torch.tensor([ids]), pack_rows([[len(ids)]], len(ids))) for ids in token_lists]
