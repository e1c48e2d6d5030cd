"""Emulate on the CPU the CUDA calls that Megatron-Core 0.16 makes on every device.

Core itself stays unmodified. The list is short: current_device, set_device, synchronize, the device's RNG state,
Tensor.cuda and Module.cuda, device="cuda" in factory functions and `.to`, and the class names of CUDA tensors. Core
uses them in pipeline schedules and p2p (device="cuda", current_device), parameter and gradient buffers, the
optimizer's and clip_grads' `.type()` comparisons, tensor_parallel's mappings and random, and the checkpoint writer.
`install` does nothing on a host with CUDA. `CudaMeansCpu` costs about 3 us per torch call and applies to the thread
that installed it only.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_installed = False


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaMeansCpu(TorchFunctionMode):
    """Mode that reads device="cuda" as the CPU and gives CPU tensors the class names that core compares with."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type[Any]],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and any(_is_cuda(argument) for argument in args[1:]):
            args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def install() -> None:
    """Install the emulation in this process; do nothing the second time or on a host with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    keep_freed_memory()
    with warnings.catch_warnings():
        # core warns about every optional package it does not find
        warnings.simplefilter("ignore")
        # before the patches below: importing core imports torch's compiler, which lists torch.cuda's functions
        import megatron.core.tensor_parallel.random as core_random
    _patch_device_calls()
    for name in ("FloatTensor", "BFloat16Tensor", "HalfTensor", "LongTensor", "IntTensor", "DoubleTensor"):
        setattr(torch.cuda, name, getattr(torch, name))
    mode: TorchFunctionMode = CudaMeansCpu()
    mode.__enter__()
    _use_local_kernels()
    core_random._get_cuda_rng_state = _get_rng_state
    core_random._set_cuda_rng_state = _set_rng_state


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _patch_device_calls() -> None:
    cuda: Any = torch.cuda
    # one function each: torch's compiler, which core's fused functions use, refuses one object under two names
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.set_device = lambda *_, **__: None
    cuda.synchronize = lambda *_, **__: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for module in (cuda, cuda.random):
        module.get_rng_state = _get_rng_state
        module.set_rng_state = _set_rng_state
    for patched in (torch.Tensor, torch.nn.Module):
        setattr(patched, "cuda", lambda self, *_, **__: self)  # noqa: B010


def _use_local_kernels() -> None:
    """Compute gradient norms and copies by core's torch code, even where Transformer Engine imports without a GPU."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


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
