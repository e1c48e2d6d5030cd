"""CUDA graphs: kernels recorded once and started together, for models whose kernels are shorter than the time that the
host needs to start them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UP_CALLS = 3  # libraries choose algorithms and allocate workspaces in their first calls

Tensors = Sequence[torch.Tensor]


class CapturedGraph:
    """`function` of tensors of fixed shapes, recorded at its fourth call and replayed from then on.

    It must not wait for the device, allocate by what tensors hold, or leave anything but what it returns and writes to
    memory that outlives it. What a call returns is overwritten by the next."""

    def __init__(self, function: Callable[[Tensors], Tensors]) -> None:
        self.function, self.calls = function, 0
        self.graph: Any = None

    def __call__(self, tensors: Tensors) -> Tensors:
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            return self._beside(tensors)
        if self.graph is None:
            self._record(tensors)
        else:
            for place, tensor in zip(self.inputs, tensors, strict=True):
                place.copy_(tensor)
        self.graph.replay()
        return self.outputs

    def _beside(self, tensors: Tensors) -> Tensors:
        """On a stream of its own, as recording will be."""
        stream, own = torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(stream)
        with torch.cuda.stream(own):
            outputs = self.function(tensors)
        stream.wait_stream(own)
        return outputs

    def _record(self, tensors: Tensors) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.graph = torch.cuda.CUDAGraph()
        # other threads of this process may pin memory meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = self.function(self.inputs)
