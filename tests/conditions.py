"""Conditions that tests set up during a run, with no fault in the code or the host."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import time
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def _stop_in(phase: str) -> Iterator[None]:
    """Deliver a stop signal in the second step of a phase."""
    from megatron_ettin.train import trainer
    from megatron_ettin.train.progress import ControlSignal

    step = trainer.train_step

    def stopping(train_state, *arguments, **named):
        call = inspect.signature(step).bind(train_state, *arguments, **named)
        if (train_state.config.run.phase, train_state.progress.step) == (phase, 1):
            call.arguments["signal"] = ControlSignal.STOP
        return step(*call.args, **call.kwargs)

    with mock.patch.object(trainer, "train_step", stopping):
        yield


stop_in_pretrain, stop_in_extend, stop_in_decay = (
    functools.partial(_stop_in, phase) for phase in ("pretrain", "extend", "decay")
)


@contextlib.contextmanager
def late_updates_are_printed() -> Iterator[None]:
    """Print a line for each update that waited for the anomaly detector."""
    from megatron_ettin.faults.heartbeat import LATE_UPDATE, Heartbeat

    set_phase = Heartbeat.set_phase

    def logged(self, doing):
        if doing == LATE_UPDATE:
            print("updated after its figures were judged")
        set_phase(self, doing)

    with mock.patch.object(Heartbeat, "set_phase", logged):
        yield


@contextlib.contextmanager
def fp32_orthogonal() -> Iterator[None]:
    """Run Muon's iterations in fp32. In bfloat16 the last bit of a gradient changes an update by 1/256,
    which would hide a wrong shard."""
    from megatron_ettin.optim import muon

    with mock.patch.object(muon, "orthogonal_updates", newton_schulz):
        yield


def newton_schulz(matrices, adjust_lr: str):
    """Return Muon's updates in fp32 (https://kellerjordan.github.io/posts/muon), scaled as torch.optim.Muon does."""
    results = []
    for g in matrices:
        rows, columns = g.shape
        x = (g if rows <= columns else g.T) / g.norm().clamp(min=1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        scale = max(1, rows / columns) ** 0.5 if adjust_lr == "original" else 0.2 * max(rows, columns) ** 0.5
        results.append(-scale * (x if rows <= columns else x.T))
    return results


@contextlib.contextmanager
def delayed_scales() -> Iterator[None]:
    """Give linears a stand-in for the state of Transformer Engine's delayed FP8 scaling, which needs a GPU.

    It is made in a linear's first forward pass in training and changed by each one. This tests saving and restoring."""
    import torch

    from megatron_ettin.checkpoint import state
    from megatron_ettin.train import setup

    def make(linear, *_) -> None:
        if "scaling_fwd" not in linear.fp8_meta:
            for key, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                state = types.SimpleNamespace(scale=torch.ones(tensors), amax_history=torch.zeros(1, tensors))
                linear.fp8_meta[key] = state

    def changed(linear, *_) -> None:
        if linear.training:
            make(linear)
            for number, state in enumerate(linear.fp8_meta.values()):
                state.scale.mul_(1.125).add_(linear.index_in_model + number)
                state.amax_history.add_(1)

    build = setup.build_chunks

    def with_state(*arguments, **named):
        chunks = build(*arguments, **named)
        for chunk in chunks:
            for layer in chunk.transformer.layers:
                for index, linear in enumerate((layer.self_attention.linear_qkv, layer.mlp.linear_fc2)):
                    linear.fp8_meta, linear.index_in_model = {}, layer.layer_number + index / 2
                    linear.register_forward_pre_hook(changed)
        return chunks

    with (
        mock.patch.object(setup, "build_chunks", with_state),
        mock.patch.object(state, "keeps_scales", lambda config: True),
        mock.patch.object(state, "make_delayed_scales", make),
    ):
        yield


@contextlib.contextmanager
def replayed_on_a_cpu() -> Iterator[None]:
    """Run `runtime.cuda_graph` without CUDA: no graph is captured, but memory is used as in a replay.

    Every call reads its inputs from the same buffers, in the same shapes, and writes its outputs to the same
    buffers."""
    import torch

    from megatron_ettin.platform.device import Platform
    from megatron_ettin.train import graphed_step

    class InPlace:
        def __init__(self, function) -> None:
            self.function, self.calls = function, 0

        def __call__(self, tensors):
            self.calls += 1
            if self.calls == 1:
                self.inputs = [tensor.clone() for tensor in tensors]
            for buffer, tensor in zip(self.inputs, tensors, strict=True):
                assert buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
                buffer.copy_(tensor)
            results = self.function(self.inputs)
            if self.calls == 1:
                self.outputs = [torch.empty_like(tensor) for tensor in results]
                print("replaying")
            for buffer, tensor in zip(self.outputs, results, strict=True):
                buffer.copy_(tensor)
            return self.outputs

    with (
        mock.patch.object(Platform, "check_graph", lambda *_: None),
        mock.patch.object(graphed_step, "CapturedGraph", InPlace),
    ):
        yield


@contextlib.contextmanager
def replayed_on_a_cpu_with_a_metric() -> Iterator[None]:
    """Add a metric in `add_losses`, as docs/architecture.md advises, to a run with `replayed_on_a_cpu`."""
    from megatron_ettin.train import step

    real = step.add_losses

    def add_losses(totals, losses):
        real(totals, losses)
        totals.add("summed_loss", None if losses is None else losses.double().sum())

    with replayed_on_a_cpu(), mock.patch.object(step, "add_losses", add_losses):
        yield


@contextlib.contextmanager
def slow_saves_and_evaluations() -> Iterator[None]:
    """Make each save and evaluation take 3.5 s longer, which is more than a step may take."""
    from megatron_ettin.train import saving
    from megatron_ettin.train.hooks import metrics

    def slowly(real):
        def late(*arguments, **named):
            time.sleep(3.5)
            return real(*arguments, **named)

        return late

    with (
        mock.patch.object(metrics, "evaluate", slowly(metrics.evaluate)),
        mock.patch.object(saving.Saver, "wait", slowly(saving.Saver.wait)),
    ):
        yield


@contextlib.contextmanager
def wandb_offline() -> Iterator[None]:
    """Set the environment of a machine that cannot reach wandb's service."""
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}):
        yield


@contextlib.contextmanager
def room_after_step_8() -> Iterator[None]:
    """Delete the file that fills the disk after the eighth step."""
    from megatron_ettin.train.hooks import metrics

    real = metrics.Metrics.step

    def step(self, run, info):
        real(self, run, info)
        if info.step == 8 and run.is_main_process:
            (Path(run.config.checkpoint.staging or run.directory.parent) / "filler").resolve().unlink()

    with mock.patch.object(metrics.Metrics, "step", step):
        yield


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Divide the files of a tiny model into many blocks."""
    from megatron_ettin.base import digests

    with mock.patch.object(digests, "BLOCK_BYTES", 1 << 16):
        yield
