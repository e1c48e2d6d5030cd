"""Capture kernels once in a CUDA graph and launch them together.

Graphs help where kernels are shorter than the time that the host needs to launch them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# libraries choose algorithms and allocate workspaces in their first calls
WARM_UP_CALLS = 3

Tensors = Sequence[torch.Tensor]


class CapturedGraph:
    """A function of tensors of fixed shapes, captured at its fourth call and replayed from then on.

    It must not wait for the device or allocate depending on values. Its only effects may be what it returns and what it
    writes to memory that outlives it. The next call overwrites what a call returned.
    """

    def __init__(self, function: Callable[[Tensors], Tensors]) -> None:
        self.function, self.calls = function, 0
        self.graph: Any = None

    def __call__(self, tensors: Tensors) -> Tensors:
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            return self._warm_up(tensors)
        if self.graph is None:
            self._capture(tensors)
        else:
            for static, tensor in zip(self.inputs, tensors, strict=True):
                static.copy_(tensor)
        self.graph.replay()
        return self.outputs

    def _warm_up(self, tensors: Tensors) -> Tensors:
        """Run the function on a stream of its own, as the capture will."""
        stream, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
        side_stream.wait_stream(stream)
        with torch.cuda.stream(side_stream):
            outputs = self.function(tensors)
        stream.wait_stream(side_stream)
        return outputs

    def _capture(self, tensors: Tensors) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.graph = torch.cuda.CUDAGraph()
        # other threads of this process may pin memory at the same time
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = self.function(self.inputs)
