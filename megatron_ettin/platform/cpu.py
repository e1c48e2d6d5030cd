"""Answers, on a machine without CUDA, the CUDA calls that Megatron-Core 0.16 makes whatever the device.

Core itself stays unmodified. The list is short and named: current_device, set_device, synchronize, the RNG state of the
device, Tensor.cuda and Module.cuda, device="cuda" in factory functions and `.to`, and the class names of CUDA tensors.
Where core asks for them: pipeline schedules and p2p (device="cuda", current_device), parameter and gradient buffers,
the optimizer's and clip_grads' `.type()` comparisons, tensor_parallel's mappings and random, the checkpoint writer.
`install` does nothing on a machine that has CUDA. It costs about 3 us per torch call, and is local to its thread."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_ettin.platform.memory import keep_freed_memory

CPU = torch.device("cpu")
_installed = False


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaMeansCpu(TorchFunctionMode):
    """Reads device="cuda" as the CPU, and lets CPU tensors answer to the class names core compares with."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and any(_is_cuda(argument) for argument in args[1:]):
            args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def install() -> None:
    """Make this process's torch answer for CUDA. Once; not on a machine with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    keep_freed_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # core warns of every optional package it does not find
        # before the answers below: importing core imports torch's compiler, which lists torch.cuda's functions
        import megatron.core.tensor_parallel.random as core_random
    _answer_device_calls()
    _answer_tensor_types()
    CudaMeansCpu().__enter__()
    _use_local_kernels()
    core_random._get_cuda_rng_state = _get_rng_state
    core_random._set_cuda_rng_state = _set_rng_state


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _answer_device_calls() -> None:
    cuda: Any = torch.cuda

    # a function each: torch's compiler, which core's fused functions pass through, refuses one object under two names
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.set_device = lambda *_, **__: None
    cuda.synchronize = lambda *_, **__: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for module in (cuda, cuda.random):
        module.get_rng_state = _get_rng_state
        module.set_rng_state = _set_rng_state
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]


def _answer_tensor_types() -> None:
    for name in ("FloatTensor", "BFloat16Tensor", "HalfTensor", "LongTensor", "IntTensor", "DoubleTensor"):
        setattr(torch.cuda, name, getattr(torch, name))


def _use_local_kernels() -> None:
    """Gradient norms and copies by core's plain torch code, also where Transformer Engine imports without a GPU."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
