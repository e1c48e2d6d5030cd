"""Measure what a rank uses: the memory of live tensors, and the bytes that its process groups send.

`PeakMemoryTracker` counts the memory of tensors on a CPU, which does not count its allocations; memory predictions are
compared with it. `CommVolumeTracker` counts bytes, and times the calls and waits of this rank. It replaces the methods
of torch's ProcessGroup and `Work.wait`, which every collective and transfer uses, whoever calls it (core, Transformer
Engine, this package).
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ProcessGroup methods of several torch versions -> index of the argument that holds all data; None: nothing is counted
WHOLE_OUT = ("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single")
WHOLE_IN = ("_reduce_scatter_base", "reduce_scatter", "reduce_scatter_single")
SENT = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "send", "reduce"), 0),
    **dict.fromkeys((*WHOLE_OUT, "allgather_into_tensor_coalesced", "all_gather_single_coalesced"), 0),
    **dict.fromkeys((*WHOLE_IN, "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"), 1),
    **dict.fromkeys(("alltoall_base", "alltoall", "all_to_all_single"), 1),
    **dict.fromkeys(("recv", "recv_anysource", "barrier"), None),
}


def is_symbolic(tensor: torch.Tensor) -> bool:
    """Return whether torch's compiler traced with this tensor.

    Such tensors stay after a compilation and hold no memory, and their size depends on a solver that may be gone.
    """
    return getattr(getattr(tensor, "fake_mode", None), "shape_env", None) is not None


class PeakMemoryTracker(TorchDispatchMode):
    """Count, inside its context, the bytes of all tensor storages and their peak.

    It counts storages that existed before (found by the garbage collector) and those that operations return, until
    they are freed. It does not see memory that a kernel allocates and frees itself.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
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
        # a subclass of tensors that has no storage
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


class CommVolumeTracker:
    """Count the bytes that this rank passes to collectives and transfers inside `track`, by (axis, method).

    `axes` maps the name of a process group to its axis; other groups count as `all`.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        self.axes = axes
        self.bytes_sent: Counter[tuple[str, str]] = Counter()

    def by_axis(self) -> dict[str, int]:
        """Return the bytes of each axis, over all methods."""
        totals: Counter[str] = Counter()
        for (axis, _), count in self.bytes_sent.items():
            totals[axis] += count
        return dict(totals)

    @contextlib.contextmanager
    def track(self, span: Callable[[str], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
        """Count bytes inside the context, and run each call and each wait in `span(axis)`, which may time it."""
        group_class: Any = dist.ProcessGroup
        work_class: Any = torch._C._distributed_c10d.Work
        # vars, not getattr: a bound attribute would not be passed the group once it is restored
        originals = {name: vars(group_class)[name] for name in SENT if name in vars(group_class)}
        wait = vars(work_class)["wait"]
        pending: dict[int, tuple[Any, str | None]] = {}

        def timed(axis: str | None) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext() if axis is None else span(axis)

        def call(name: str, group: Any, *arguments: Any, **named: Any) -> Any:
            # a group of one rank sends nothing and waits for nobody
            axis = self.axes.get(group.group_name, "all") if group.size() > 1 else None
            if axis is not None and (index := SENT[name]) is not None:
                tensors = [leaf for leaf in tree_leaves(arguments[index]) if isinstance(leaf, torch.Tensor)]
                self.bytes_sent[axis, name] += sum(tensor.nbytes for tensor in tensors)
            with timed(axis):
                work = originals[name].__get__(group)(*arguments, **named)
            # holding the object keeps others from getting its id
            if work is not None:
                pending[id(work)] = work, axis
            return work

        def wait_for(work: Any, *arguments: Any, **named: Any) -> Any:
            _, axis = pending.pop(id(work), (work, "all"))
            with timed(axis):
                return wait.__get__(work)(*arguments, **named)

        try:
            for name in originals:
                setattr(group_class, name, _method(call, name))
            work_class.wait = wait_for
            yield
        finally:
            for name, method in originals.items():
                setattr(group_class, name, method)
            work_class.wait = wait


def _method(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda group, *arguments, **named: call(name, group, *arguments, **named)
