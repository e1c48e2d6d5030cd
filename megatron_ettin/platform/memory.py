"""Measure the memory of live tensors, and configure the allocator of this process.

Where no device counts its allocations, the sum of live tensor storages is what memory predictions are compared with.
"""

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


def is_symbolic(tensor: torch.Tensor) -> bool:
    """Return whether torch's compiler traced with this tensor.

    Such tensors stay after a compilation and hold no memory, and their size depends on a solver that may be gone.
    """
    return getattr(getattr(tensor, "fake_mode", None), "shape_env", None) is not None


class PeakMemoryTracker(TorchDispatchMode):
    """Count, inside its context, the bytes of all tensor storages and their peak.

    Counted are storages that existed before (found by the garbage collector) and those that operations return, until
    they are freed. Memory that a kernel allocates and frees itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        # bytes of each live storage
        self.held: dict[int, int] = {}
        self.bytes = self.peak_bytes = 0
        for item in gc.get_objects():
            # isinstance would touch objects that warn when they are used
            if issubclass(type(item), torch.Tensor):
                self.add(item)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return output

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        if is_symbolic(tensor):
            return
        try:
            storage = tensor.untyped_storage()
        # a subclass without a storage of its own
        except NotImplementedError:
            return
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = storage.nbytes()
        self.bytes += self.held[key]
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.bytes -= self.held.pop(key, 0)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them; do nothing without glibc.

    A training step and a conversion allocate the same sizes again and again, and faulting in their pages each time
    costs a fifth of the time.
    """
    # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
