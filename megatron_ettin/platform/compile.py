"""Shorten a step's kernels and their launches by fused element-wise functions and captured CUDA graphs.

`maybe_compile` decorates functions that torch's compiler fuses to one kernel each after `enable_compile(True)`.

A GPU spends a quarter of a bf16 step, and more of an FP8 one, on memory traffic between matrix products. Transformer
Engine fuses the norms; the rest (rotation, gate, dropout with its hash, softmax of the vocabulary) is decorated here.
Uncompiled they are ordinary functions on every device: compiling takes seconds, too long for short CPU runs.

`CapturedGraph` launches many kernels together, which helps if they are shorter than the time that the host needs to
launch them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from megatron_ettin.base.errors import UserError

_functions: list[MaybeCompiled] = []
_state = {"enabled": False}
# calls before a capture: in their first calls libraries choose algorithms and allocate workspaces
WARM_UP_CALLS = 3

Tensors = Sequence[torch.Tensor]


class MaybeCompiled:
    """A function of tensors and constants that may be compiled; `maybe_compile` makes it."""

    def __init__(self, function: Callable[..., Any], dynamic: bool | None) -> None:
        self.function = self.call = function
        self.dynamic = dynamic
        self.__doc__ = function.__doc__
        _functions.append(self)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, or its kernel once it is compiled."""
        return self.call(*arguments)


def maybe_compile(function: Callable[..., Any], dynamic: bool | None = None) -> MaybeCompiled:
    """Decorate a function that `enable_compile` may compile.

    `dynamic`: True compiles one kernel for all sizes, for functions that are called with many; None: torch decides.
    """
    return MaybeCompiled(function, dynamic)


def compile_enabled() -> bool:
    """Return whether decorated functions are compiled."""
    return _state["enabled"]


def enable_compile(enabled: bool) -> None:
    """Make every decorated function compile at its next call, or (False) run uncompiled."""
    _state["enabled"] = enabled
    for maybe in _functions:
        maybe.call = torch.compile(maybe.function, dynamic=maybe.dynamic) if enabled else maybe.function


def should_compile(wanted: str, is_gpu: bool) -> bool:
    """Return whether to compile on this device for `runtime.compile` = auto, always or never.

    Raises:
        UserError: `always`, and this host lacks what the compiler needs.
    """
    missing = None
    if is_gpu and find_spec("triton") is None:
        missing = "Triton, which torch's CUDA builds bring along"
    elif not is_gpu and not (shutil.which("g++") or shutil.which("clang++")):
        missing = "a C++ compiler (g++ or clang++)"
    if wanted == "always" and missing:
        raise UserError(
            f"runtime.compile=always needs {missing}; install it, or set runtime.compile=never, which computes the same"
            " uncompiled"
        )
    return wanted == "always" or (wanted == "auto" and is_gpu and missing is None)


class CapturedGraph:
    """A function of tensors of fixed shapes, captured at its fourth call and replayed from then on.

    The function must not wait for the device, and what it allocates must not depend on values. Its only effects may be
    its outputs and writes to memory that outlives it. Each replay overwrites the outputs of the one before.
    """

    def __init__(self, function: Callable[[Tensors], Tensors]) -> None:
        self.function, self.calls = function, 0
        self.graph: Any = None

    def __call__(self, tensors: Tensors) -> Tensors:
        """Return the function's outputs, by replaying its kernels from the fourth call on."""
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
        """Run the function on a side stream, as the capture will."""
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
