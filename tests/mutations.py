"""Mistakes that the invariance table must catch: each makes distributed training wrong without an error."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import os
import time
import types
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def rms_per_shard() -> Iterator[None]:
    """StableAdamW's clip from this rank's shard alone."""
    from megatron_ettin.optim import adamw

    bind = adamw.DecoupledAdamW.bind

    def alone(self, tensors, length, group):
        def shard(p, piece):
            numel = max(1, p[piece.at].numel())
            return dataclasses.replace(piece, whole=adamw.WholeTensor(piece.whole.index, numel, True))

        bind(self, {p: [shard(p, piece) for piece in pieces] for p, pieces in tensors.items()}, length, None)

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
def _stop_in(phase: str) -> Iterator[None]:
    """No mistake: a signal to stop that arrives in the second step of a phase."""
    from megatron_ettin.train import loop

    step = loop.train_step

    def stopping(machine, batches, number, tokens, lr, stop, *more):
        now = (machine.config.run.phase, number) == (phase, 1)
        return step(machine, batches, number, tokens, lr, stop or now, *more)

    with mock.patch.object(loop, "train_step", stopping):
        yield


stop_in_pretrain, stop_in_extend, stop_in_decay = (
    functools.partial(_stop_in, phase) for phase in ("pretrain", "extend", "decay")
)


@contextlib.contextmanager
def fp32_orthogonal() -> Iterator[None]:
    """No mistake: Muon's iteration in fp32. In bfloat16 a gradient's last bit moves an update by a part in 256, which
    would hide a wrong shard."""
    from megatron_ettin.optim import muon

    with mock.patch.object(muon, "steps", _newton_schulz):
        yield


@contextlib.contextmanager
def orthogonal_per_shard() -> Iterator[None]:
    """Muon on this rank's part of each matrix."""
    from megatron_ettin.optim import muon

    def alone(self, shard, matrix, adjust_lr):
        return matrix.joined(_newton_schulz(matrix.parts(shard), adjust_lr))

    with mock.patch.object(muon.Muon, "_orthogonal", alone):
        yield


def _newton_schulz(matrices, adjust_lr: str):
    """https://kellerjordan.github.io/posts/muon, with the step sizes of torch.optim.Muon."""
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
    """No mistake: linears with the state that Transformer Engine gives them in FP8 with delayed scaling, made at their
    first forward pass in training, and changed by each. (TE wants a GPU: what is tested is what is kept of it.)"""
    import torch

    from megatron_ettin.checkpoint import fp8_state
    from megatron_ettin.train import assembly

    def make(linear, *_) -> None:
        if "scaling_fwd" not in linear.fp8_meta:
            for key, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                state = types.SimpleNamespace(scale=torch.ones(tensors), amax_history=torch.zeros(1, tensors))
                linear.fp8_meta[key] = state

    def changed(linear, *_) -> None:
        if linear.training:
            make(linear)
            for number, state in enumerate(linear.fp8_meta.values()):
                state.scale.mul_(1.125).add_(linear.place + number)
                state.amax_history.add_(1)

    build = assembly.build_chunks

    def with_state(*arguments, **named):
        chunks = build(*arguments, **named)
        for chunk in chunks:
            for layer in chunk.transformer.layers:
                for place, linear in enumerate((layer.self_attention.linear_qkv, layer.mlp.linear_fc2)):
                    linear.fp8_meta, linear.place = {}, layer.layer_number + place / 2
                    linear.register_forward_pre_hook(changed)
        return chunks

    with (
        mock.patch.object(assembly, "build_chunks", with_state),
        mock.patch.object(fp8_state, "keeps_scales", lambda config: True),
        mock.patch.object(fp8_state, "make_delayed_scales", make),
    ):
        yield


@contextlib.contextmanager
def replayed_on_a_cpu() -> Iterator[None]:
    """No mistake: `run.cuda_graph` without CUDA. Every call finds its inputs in the same memory, in the same shapes,
    and leaves its outputs in the same memory, as in a recording; what it cannot show is the recording itself."""
    import torch

    from megatron_ettin.platform.device import Platform
    from megatron_ettin.train import graphed

    class InPlace:
        def __init__(self, function) -> None:
            self.function, self.calls = function, 0

        def __call__(self, tensors):
            self.calls += 1
            if self.calls == 1:
                self.inputs = [tensor.clone() for tensor in tensors]
            for place, tensor in zip(self.inputs, tensors, strict=True):
                assert place.shape == tensor.shape and place.dtype == tensor.dtype
                place.copy_(tensor)
            found = self.function(self.inputs)
            if self.calls == 1:
                self.outputs = [torch.empty_like(tensor) for tensor in found]
                print("replaying")
            for place, tensor in zip(self.outputs, found, strict=True):
                place.copy_(tensor)
            return self.outputs

    with (
        mock.patch.object(Platform, "check_graph", lambda *_: None),
        mock.patch.object(graphed, "Replayed", InPlace),
    ):
        yield


@contextlib.contextmanager
def edited_code_on_rank_1() -> Iterator[None]:
    """A node's checkout is not that of the others."""
    from megatron_ettin.train import agreement

    real = agreement.code_hash
    agreement.code_hash = lambda: "edited" if os.environ["RANK"] == "1" else real()  # type: ignore[assignment]
    try:
        yield
    finally:
        agreement.code_hash = real


@contextlib.contextmanager
def nan_gradients_in_step_3() -> Iterator[None]:
    """One rank's gradients come out of the third step's backward pass as no numbers."""
    from megatron_ettin.train import step

    real, calls = step.run_micro_batches, 0

    def run(machine, *arguments, training):
        nonlocal calls
        found = real(machine, *arguments, training=training)
        calls += training
        if training and calls == 3 and machine.layout.rank == machine.layout.topology.world - 1:
            machine.wrapped[0].buffers[0].grad_data.fill_(float("nan"))
        return found

    with mock.patch.object(step, "run_micro_batches", run):
        yield


@contextlib.contextmanager
def flipped_weight_on_rank_1() -> Iterator[None]:
    """After the second step a bit of rank 1's last norm is another one."""
    import torch

    from megatron_ettin.train import loop

    real = loop.train_step

    def step(machine, *arguments):
        info = real(machine, *arguments)
        if info.step == 2 and machine.layout.rank == 1:
            weight = dict(machine.chunks[-1].named_parameters())["transformer.final_layernorm.weight"]
            weight.data.view(torch.int32)[3] ^= 1
        return info

    with mock.patch.object(loop, "train_step", step):
        yield


@contextlib.contextmanager
def unsound_layer_on_rank_1() -> Iterator[None]:
    """Rank 1's second layer computes something else each time when steps are checked again."""
    from megatron_ettin.train import recheck

    real, passes = recheck.digests, 0

    def digests(machine, *arguments):
        nonlocal passes
        passes += 1
        layer = machine.chunks[0].transformer.layers[1]
        hook = layer.mlp.register_forward_pre_hook(lambda m, inputs: (inputs[0] * (1 + 1e-3 * passes), *inputs[1:]))
        try:
            return real(machine, *arguments)
        finally:
            hook.remove()

    with contextlib.ExitStack() as stack:
        if os.environ["RANK"] == "1":
            stack.enter_context(mock.patch.object(recheck, "digests", digests))
        yield


@contextlib.contextmanager
def _rank_1_reads(act) -> Iterator[None]:
    """What rank 1 does before it reads the rows of a step."""
    from megatron_ettin.train.host_batches import HostBatches

    make = HostBatches.make

    def made(self, step, index):
        if os.environ["RANK"] == "1":
            act(step)
        return make(self, step, index)

    with mock.patch.object(HostBatches, "make", made):
        yield


def _sleep_at_step_3(step: int) -> None:
    if step == 3:
        time.sleep(1000)


def _hold_the_interpreter_at_step_3(step: int) -> None:
    """A loop in C code that lets no other thread of Python in."""
    if step == 3:
        ctypes.PyDLL("libc.so.6").sleep(1000)


reading_stops_on_rank_1 = functools.partial(_rank_1_reads, _sleep_at_step_3)
c_code_on_rank_1 = functools.partial(_rank_1_reads, _hold_the_interpreter_at_step_3)
slow_rank_1 = functools.partial(_rank_1_reads, lambda step: time.sleep(0.05))


@contextlib.contextmanager
def slow_saves_and_evaluations() -> Iterator[None]:
    """No mistake: each of them takes longer than a step may."""
    from megatron_ettin.train import evaluate, saving

    def slowly(real):
        def late(*arguments, **named):
            time.sleep(3.5)
            return real(*arguments, **named)

        return late

    with (
        mock.patch.object(evaluate, "evaluate", slowly(evaluate.evaluate)),
        mock.patch.object(saving.Saver, "settle", slowly(saving.Saver.settle)),
    ):
        yield


@contextlib.contextmanager
def wandb_offline() -> Iterator[None]:
    """No mistake: the environment of a machine without a way to wandb's service."""
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}):
        yield


@contextlib.contextmanager
def room_after_step_8() -> Iterator[None]:
    """Whoever filled the disk beside the run goes away."""
    from megatron_ettin.train import hooks

    real = hooks.Metrics.step

    def step(self, run, info):
        real(self, run, info)
        if info.step == 8 and run.is_chief:
            (run.directory.parent / "filler").unlink()

    with mock.patch.object(hooks.Metrics, "step", step):
        yield


@contextlib.contextmanager
def disk_full_while_writing() -> Iterator[None]:
    """Each save finds the disk nearly full once it has begun to write."""
    from megatron_ettin.checkpoint import background

    real = background.Plan.write

    def write(self, local=None):
        filler = self.folder.parents[2] / "filler"
        if self.rank == 0 and not filler.exists():
            with contextlib.suppress(OSError), open(filler, "wb") as file:
                while True:
                    file.write(b"\0" * 4096)
                    file.flush()
        while not filler.exists():
            pass
        real(self, local)

    with mock.patch.object(background.Plan, "write", write):
        yield


@contextlib.contextmanager
def fails_once_on_rank_1() -> Iterator[None]:
    """An error in the middle of a step, and not again."""
    failed: list[int] = []

    def act(step: int) -> None:
        if step == 12 and not failed:
            failed.append(step)
            raise RuntimeError("a link went down")

    with _rank_1_reads(act):
        yield


def _fail_at_step_12(step: int) -> None:
    if step == 12:
        raise RuntimeError("a link went down again")


fails_always_on_rank_1 = functools.partial(_rank_1_reads, _fail_at_step_12)


@contextlib.contextmanager
def doctor_of_other_code_on_rank_1() -> Iterator[None]:
    """A node's checkout is not that of the others, and `ettin doctor --ranks` looks."""
    from megatron_ettin.doctor import ranks

    real = ranks.code_hash
    ranks.code_hash = lambda: "edited" if os.environ["RANK"] == "1" else real()  # type: ignore[assignment]
    try:
        yield
    finally:
        ranks.code_hash = real


@contextlib.contextmanager
def memory_ends_on_rank_1() -> Iterator[None]:
    """Micro-batches of two rows do not fit, on one rank alone, in the middle of a step."""
    import torch

    from megatron_ettin.train import step

    real = step.run_micro_batches

    def run(machine, *arguments, training):
        found = real(machine, *arguments, training=training)
        if os.environ["RANK"] == "1" and machine.config.batch.micro_batch_rows == 2:
            raise torch.OutOfMemoryError("CUDA out of memory: all of it")
        return found

    with mock.patch.object(step, "run_micro_batches", run):
        yield


@contextlib.contextmanager
def resumed_with_another_bit() -> Iterator[None]:
    """Whoever goes on from a checkpoint has one bit of the last rank's weights as another one."""
    import torch

    from megatron_ettin.train import resume

    real = resume.begin

    def begin(machine, *arguments):
        progress, origin = real(machine, *arguments)
        if progress.step and machine.layout.rank == machine.layout.topology.world - 1:
            weight = dict(machine.chunks[-1].named_parameters())["transformer.final_layernorm.weight"]
            weight.data.view(torch.int32)[3] ^= 1
            machine.optimizer.take_weights()
        return progress, origin

    with mock.patch.object(resume, "begin", begin):
        yield


@contextlib.contextmanager
def latest_before_the_checkpoint() -> Iterator[None]:
    """`latest` names a checkpoint before it is there."""
    from megatron_ettin.checkpoint import directory

    real = directory.place

    def place(staging, final, known=None):
        directory.write_synced(final.parent / directory.LATEST, final.name + "\n")
        real(staging, final, known)

    with mock.patch.object(directory, "place", place):
        yield


@contextlib.contextmanager
def nothing_forced_to_the_disk() -> Iterator[None]:
    """No file of a checkpoint is on the disk before it is renamed."""
    from megatron_ettin.checkpoint import directory, integrity

    with (
        mock.patch.object(integrity, "fsync", lambda path: None),
        mock.patch.object(directory, "fsync", lambda path: None),
    ):
        yield


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """No mistake: files of a tiny model have many blocks."""
    from megatron_ettin.checkpoint import digests

    with mock.patch.object(digests, "BLOCK_BYTES", 1 << 16):
        yield
