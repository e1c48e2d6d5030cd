"""Mistakes that the invariance table must catch: each makes distributed training wrong without an error."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def rms_per_shard() -> Iterator[None]:
    """StableAdamW's clip from this rank's shard alone."""
    from megatron_ettin.optim import adamw

    bind = adamw.DecoupledAdamW.bind

    def alone(self, tensors, length, group):
        local = {p: adamw.WholeTensor(whole.index, max(1, p.numel()), True) for p, whole in tensors.items()}
        bind(self, local, length, None)

    with mock.patch.object(adamw.DecoupledAdamW, "bind", alone):
        yield


@contextlib.contextmanager
def no_data_parallel_reduction() -> Iterator[None]:
    """Each replica trains on its own gradients."""
    from megatron.core.distributed import DistributedDataParallel

    def nothing(self, *_, **__):
        return None

    with (
        mock.patch.object(DistributedDataParallel, "start_grad_sync", nothing),
        mock.patch.object(DistributedDataParallel, "finish_grad_sync", nothing),
    ):
        yield


@contextlib.contextmanager
def no_tied_embedding_reduction() -> Iterator[None]:
    """First and last pipeline stage update their copies of the embedding from their own gradients."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function hides its name
    with mock.patch.object(module, "_allreduce_word_embedding_grads", lambda *_, **__: None):
        yield


@contextlib.contextmanager
def stop_in_extend() -> Iterator[None]:
    """No mistake: a signal to stop that arrives in the second step of `extend`."""
    from megatron_ettin.train import loop

    step = loop.train_step

    def stopping(machine, batches, number, tokens, lr, stop, loaded):
        return step(
            machine, batches, number, tokens, lr, stop or (machine.config.run.phase, number) == ("extend", 1), loaded
        )

    with mock.patch.object(loop, "train_step", stopping):
        yield
