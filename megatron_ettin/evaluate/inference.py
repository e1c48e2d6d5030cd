"""Logits of a checkpoint for given tokens, in one process: what exports are compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ettin.config.schema import CheckpointConfig, Config, ParallelConfig, PrecisionConfig
from megatron_ettin.model.packed import pack_rows
from megatron_ettin.parallel.layout import destroy_model_parallel
from megatron_ettin.parallel.rendezvous import leave
from megatron_ettin.train import resume
from megatron_ettin.train.setup import Machine
from megatron_ettin.train.trainer import machine_alone


def alone_on_cpu(config: Config) -> Config:
    """The same model for one process in fp32 on the CPU."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        precision=PrecisionConfig("fp32"),
        checkpoint=CheckpointConfig(),
        run=dataclasses.replace(config.run, device="cpu"),
    )


@contextlib.contextmanager
def alone(checkpoint: Path, objective: str | None = None) -> Iterator[Machine]:
    """The checkpoint's whole model, not loaded yet, in this process; its groups are gone afterwards. With `objective`
    it attends as an encoder or a decoder does, whatever it was trained as."""
    config = alone_on_cpu(resume.checkpoint_config(checkpoint))
    run = dataclasses.replace(config.run, objective=objective or config.run.objective)
    machine = machine_alone(dataclasses.replace(config, run=run), initial_weights=False)
    try:
        yield machine
    finally:
        destroy_model_parallel()
        leave()


def logits_of(checkpoint: Path, token_lists: list[list[int]], objective: str | None = None) -> list[torch.Tensor]:
    """fp32 logits [n, vocabulary] of each list of n token ids, every list a chunk of its own.

    The checkpoint's checksums are the caller's to check."""
    with alone(checkpoint, objective) as machine, torch.no_grad():
        resume.load(machine, checkpoint, with_optimizer=False, verified=True)
        model = machine.chunks[0].eval()
        return [model(torch.tensor([ids]), pack_rows([[len(ids)]], len(ids))) for ids in token_lists]
