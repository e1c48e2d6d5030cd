"""Faults of hosts that the package detects or survives, which tests and tools/chaos.py inject into a run."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def edited_code_on_rank_1() -> Iterator[None]:
    """Give rank 1 a checkout that is not that of the others."""
    from megatron_ettin.faults import consistency

    real = consistency.code_hash
    consistency.code_hash = lambda: "edited" if os.environ["RANK"] == "1" else real()  # type: ignore[assignment]
    try:
        yield
    finally:
        consistency.code_hash = real


@contextlib.contextmanager
def nan_gradients_in_step_3() -> Iterator[None]:
    """Make one rank's gradients of the third step NaN."""
    from megatron_ettin.train import step

    real, calls = step.run_micro_batches, 0

    def run(train_state, *arguments, training):
        nonlocal calls
        totals = real(train_state, *arguments, training=training)
        calls += training
        if training and calls == 3 and train_state.layout.rank == train_state.layout.topology.world - 1:
            train_state.ddp_model_chunks[0].buffers[0].grad_data.fill_(float("nan"))
        return totals

    with mock.patch.object(step, "run_micro_batches", run):
        yield


@contextlib.contextmanager
def flipped_weight_on_rank_1() -> Iterator[None]:
    """Flip a bit of rank 1's last norm after the second step."""
    import torch

    from megatron_ettin.train import trainer

    real = trainer.train_step

    def step(train_state, *arguments):
        info = real(train_state, *arguments)
        if info.step == 2 and train_state.layout.rank == 1:
            weight = dict(train_state.model_chunks[-1].named_parameters())["transformer.final_layernorm.weight"]
            weight.data.view(torch.int32)[3] ^= 1
        return info

    with mock.patch.object(trainer, "train_step", step):
        yield


@contextlib.contextmanager
def flipped_tied_weight_on_last_stage() -> Iterator[None]:
    """Flip a bit of the last stage's copy of the tied embedding after the second step."""
    import torch

    from megatron_ettin.train import trainer

    real = trainer.train_step

    def step(train_state, *arguments):
        info = real(train_state, *arguments)
        weight = dict(train_state.model_chunks[-1].named_parameters()).get("output_layer.weight")
        if info.step == 2 and weight is not None:
            weight.data.view(torch.int32)[3] ^= 1
        return info

    with mock.patch.object(trainer, "train_step", step):
        yield


@contextlib.contextmanager
def unsound_layer_on_rank_1() -> Iterator[None]:
    """Have rank 1's second layer compute something else each time when a step is replayed."""
    from megatron_ettin.faults import consistency

    real, passes = consistency.digests, 0

    def digests(train_state, *arguments):
        nonlocal passes
        passes += 1
        layer = train_state.model_chunks[0].transformer.layers[1]
        hook = layer.mlp.register_forward_pre_hook(lambda m, inputs: (inputs[0] * (1 + 1e-3 * passes), *inputs[1:]))
        try:
            return real(train_state, *arguments)
        finally:
            hook.remove()

    with contextlib.ExitStack() as stack:
        if os.environ["RANK"] == "1":
            stack.enter_context(mock.patch.object(consistency, "digests", digests))
        yield


@contextlib.contextmanager
def _rank_1_reads(act) -> Iterator[None]:
    """Call `act(step)` on rank 1 before it reads the rows of a step."""
    from megatron_ettin.batching.host import HostBatches

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
    """Sleep in C code that holds the GIL, so that no other Python thread runs."""
    if step == 3:
        ctypes.PyDLL("libc.so.6").sleep(1000)


@contextlib.contextmanager
def reading_stops_on_rank_1() -> Iterator[None]:
    """Stop rank 1 before it reads the rows of the third step."""
    with _rank_1_reads(_sleep_at_step_3):
        yield


@contextlib.contextmanager
def c_code_on_rank_1() -> Iterator[None]:
    """Stop rank 1 in C code that lets no other thread of Python in."""
    with _rank_1_reads(_hold_the_interpreter_at_step_3):
        yield


@contextlib.contextmanager
def slow_rank_1() -> Iterator[None]:
    """Delay rank 1 in each step."""
    with _rank_1_reads(lambda step: time.sleep(0.25)):
        yield


@contextlib.contextmanager
def disk_full_while_writing() -> Iterator[None]:
    """Fill the disk once a save has begun to write."""
    from megatron_ettin.checkpoint import writer

    real = writer.Plan.write

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

    with mock.patch.object(writer.Plan, "write", write):
        yield


@contextlib.contextmanager
def no_locks() -> Iterator[None]:
    """Refuse file locks as a file system without them does."""

    def flock(handle, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with mock.patch.object(fcntl, "flock", flock):
        yield


@contextlib.contextmanager
def copies_change_a_byte() -> Iterator[None]:
    """Change a byte of each file that is copied from one file system to another."""
    real = shutil.copyfile

    def copyfile(source, target, **named):
        result = real(source, target, **named)
        if Path(source).suffix == ".distcp":
            with open(target, "r+b") as file:
                file.write(bytes([file.read(1)[0] ^ 1]))
        return result

    with mock.patch.object(shutil, "copyfile", copyfile):
        yield


@contextlib.contextmanager
def doctor_of_other_code_on_rank_1() -> Iterator[None]:
    """Give rank 1 a checkout that is not that of the others, for `ettin doctor --ranks`."""
    from megatron_ettin.doctor import ranks

    real = ranks.code_hash
    ranks.code_hash = lambda: "edited" if os.environ["RANK"] == "1" else real()  # type: ignore[assignment]
    try:
        yield
    finally:
        ranks.code_hash = real


@contextlib.contextmanager
def memory_ends_on_rank_1() -> Iterator[None]:
    """Run out of memory with micro-batches of two rows, on one rank alone, in the middle of a step."""
    import torch

    from megatron_ettin.train import step

    real = step.run_micro_batches

    def run(train_state, *arguments, training):
        totals = real(train_state, *arguments, training=training)
        if os.environ["RANK"] == "1" and train_state.config.batch.micro_batch_rows == 2:
            raise torch.OutOfMemoryError("CUDA out of memory: all of it")
        return totals

    with mock.patch.object(step, "run_micro_batches", run):
        yield
