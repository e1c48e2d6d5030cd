"""Element-wise work as one kernel each: functions that torch's compiler fuses where `fuse(True)` says so.

A GPU spends a quarter of a bf16 step, and more of an FP8 one, on moving what lies between matrix products; Transformer
Engine fuses the norms, and what it leaves (rotation, gate, dropout with its hash, softmax of the vocabulary) is here.
Unfused they are ordinary functions, the same on every device: compiling takes seconds, which short CPU runs lack."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from megatron_ettin.base.errors import UserError

_all: list[MaybeCompiled] = []
_state = {"fused": False}


class MaybeCompiled:
    """A function of tensors and constants that may be compiled. Made by the decorators below.

    `dynamic`: one kernel for tensors of every size, where a kernel for each would be compiled a hundred times."""

    def __init__(self, function: Callable[..., Any], dynamic: bool | None = None) -> None:
        self.function = self.call = function
        self.dynamic = dynamic
        self.__doc__ = function.__doc__
        _all.append(self)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


def maybe_compile(function: Callable[..., Any]) -> MaybeCompiled:
    """Decorator of a function that `fuse` may compile."""
    return MaybeCompiled(function)


def maybe_compile_dynamic(function: Callable[..., Any]) -> MaybeCompiled:
    """Decorator of a function that is called with tensors of many sizes."""
    return MaybeCompiled(function, dynamic=True)


def compile_enabled() -> bool:
    """Whether `fuse` has been told to."""
    return _state["fused"]


def enable_compile(enabled: bool) -> None:
    """Compile every fusible function when it is called next, or none."""
    _state["fused"] = enabled
    for one in _all:
        one.call = torch.compile(one.function, dynamic=one.dynamic) if enabled else one.function


def should_compile(wanted: str, is_gpu: bool) -> bool:
    """Whether `run.fuse` = auto, always or never means to compile here. Raises UserError where `always` cannot be."""
    missing = None
    if is_gpu and find_spec("triton") is None:
        missing = "Triton, which torch's CUDA builds bring along"
    elif not is_gpu and not (shutil.which("g++") or shutil.which("clang++")):
        missing = "a C++ compiler (g++ or clang++)"
    if wanted == "always" and missing:
        raise UserError(f"run.fuse: always needs {missing}; run.fuse=never computes the same unfused")
    return wanted == "always" or (wanted == "auto" and is_gpu and missing is None)
