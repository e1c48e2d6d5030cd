"""What process groups send, and how long this rank waits for it: every collective and transfer passes the methods of
torch's ProcessGroup, whoever calls it (core, Transformer Engine, this package), and the `wait` of what they return."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

# methods (of several versions of torch), and which of their arguments is the whole of what travels
WHOLE_OUT = ("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single")
WHOLE_IN = ("_reduce_scatter_base", "reduce_scatter", "reduce_scatter_single")
SENT = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "send", "reduce"), 0),
    **dict.fromkeys((*WHOLE_OUT, "allgather_into_tensor_coalesced", "all_gather_single_coalesced"), 0),
    **dict.fromkeys((*WHOLE_IN, "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"), 1),
    **dict.fromkeys(("alltoall_base", "alltoall", "all_to_all_single"), 1),
    **dict.fromkeys(("recv", "recv_anysource", "barrier"), None),
}


class CommVolumeTracker:
    """Bytes by (axis, method) while `watch` is open. `axes`: the axis of each group's name; other groups are `all`."""

    def __init__(self, axes: dict[str, str]) -> None:
        self.axes = axes
        self.sent: Counter[tuple[str, str]] = Counter()

    def by_axis(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (axis, _), sent in self.sent.items():
            found[axis] += sent
        return dict(found)

    @contextlib.contextmanager
    def watch(self, span: Callable[[str], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
        """Count, and run each call and each wait in `span(axis)`."""
        group_class: Any = dist.ProcessGroup
        work_class: Any = torch._C._distributed_c10d.Work
        # as the class has them: what getattr returns would no longer be given the group when it is put back
        before = {name: vars(group_class)[name] for name in SENT if name in vars(group_class)}
        wait = vars(work_class)["wait"]
        waited_for: dict[int, tuple[Any, str | None]] = {}

        def call(name: str, group: Any, *arguments: Any, **named: Any) -> Any:
            if group.size() == 1:
                work = before[name].__get__(group)(*arguments, **named)
                if work is not None:
                    waited_for[id(work)] = work, None  # nothing travels: its wait is none for other ranks
                return work
            axis, place = self.axes.get(group.group_name, "all"), SENT[name]
            if place is not None:
                tensors = [one for one in tree_leaves(arguments[place]) if isinstance(one, torch.Tensor)]
                self.sent[axis, name] += sum(one.nbytes for one in tensors)
            with span(axis):
                work = before[name].__get__(group)(*arguments, **named)
            if work is not None:
                waited_for[id(work)] = work, axis  # held, so that no other gets its id
            return work

        def wait_for(work: Any, *arguments: Any, **named: Any) -> Any:
            _, axis = waited_for.pop(id(work), (work, "all"))
            with contextlib.nullcontext() if axis is None else span(axis):
                return wait.__get__(work)(*arguments, **named)

        try:
            for name in before:
                setattr(group_class, name, _method(call, name))
            work_class.wait = wait_for
            yield
        finally:
            for name, method in before.items():
                setattr(group_class, name, method)
            work_class.wait = wait


def _method(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda group, *arguments, **named: call(name, group, *arguments, **named)
