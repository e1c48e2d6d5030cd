"""The sum of live tensor storages, whatever the allocator keeps: what a prediction of memory can be held against where
no device counts its own allocations.

The allocator of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def is_symbol(tensor: torch.Tensor) -> bool:
    """Whether it is one that torch's compiler traced with: such stay after a compilation and hold no memory, and asking
    for the size of one is a question to a solver that may be gone."""
    return getattr(getattr(tensor, "fake_mode", None), "shape_env", None) is not None


class PeakMemoryTracker(TorchDispatchMode):
    """Counts, while it is entered, the bytes of all storages that tensors hold: those that were there (found by the
    garbage collector) and those that operations return, until they are freed. What a kernel allocates for itself and
    frees before it returns is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}  # bytes of each storage that lives
        self.bytes = self.peak_bytes = 0
        for one in gc.get_objects():
            if issubclass(type(one), torch.Tensor):  # isinstance would wake objects that warn of being looked at
                self.add(one)

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self.add(one)
        return found

    def add(self, tensor: torch.Tensor) -> None:
        if is_symbol(tensor):
            return
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # of a subclass that has none of its own
            return
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = storage.nbytes()
        self.bytes += self.held[key]
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        self.bytes -= self.held.pop(key, 0)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of giving each back: a training step and a conversion allocate the same
    sizes again and again, and faulting their pages in anew costs a fifth of the time. Without glibc nothing happens."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
