"""Replace coalesced all-gathers of tensors of two types by one all-gather for each tensor.

Core coalesces the weights of a bucket group, where bytes of FP8 weights are mixed with 16-bit weights. NCCL gathers each
by itself; gloo copies them through one buffer of the first one's type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


class _Works:
    """Handles of one group of all-gathers, in place of torch's coalescing manager."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def wait(self) -> None:
        for work in self.started:
            if work is not None:
                work.wait()


@contextlib.contextmanager
def _at_once(*_: Any, **__: Any) -> Iterator[_Works]:
    """Replace the coalescing manager of TE's own all-gathers of FP8 tensors, which complete when called."""
    yield _Works()


def gather_one_by_one() -> None:
    import torch.distributed
    from megatron.core.distributed import param_and_grad_buffer as buffers

    together = buffers._ParamAndGradBucketGroup.start_param_sync
    gather = buffers.dist_all_gather_func

    def start(group: Any, force_sync: bool = False) -> None:
        works = _Works()

        @contextlib.contextmanager
        def manager(*_: Any, **__: Any) -> Iterator[_Works]:
            yield works

        with (
            mock.patch.object(buffers, "_coalescing_manager", manager),
            mock.patch.object(buffers, "dist_all_gather_func", lambda *a, **k: works.started.append(gather(*a, **k))),
        ):
            together(group, force_sync)

    buffers._ParamAndGradBucketGroup.start_param_sync = start
    # core imported torch's function under its own name
    torch.distributed._coalescing_manager = _at_once
