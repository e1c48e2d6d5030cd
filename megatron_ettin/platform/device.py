"""Describe the device of a rank as a `Platform`, which the floors above use instead of torch.cuda.

`detect("auto")` takes the GPU if there is one. On the CPU the same Megatron-Core runs over gloo, and `platform.cpu`
emulates the few CUDA calls it makes.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version

from megatron_ettin.base.errors import RankError, UserError
from megatron_ettin.config.layouts import KERNELS
from megatron_ettin.config.tables import PRECISIONS

# dense bf16 peak in TFLOP/s (vendors' data sheets, without sparsity); the first name that matches counts
PEAK_BF16_TFLOPS = {
    **{"H100 PCIe": 756.0, "H100 NVL": 835.5},
    **{"H100": 989.4, "H200": 989.4, "B200": 2250.0, "A100": 312.0, "L40S": 362.0},
}
# the first version whose fused attention supports a window on both sides
OLDEST_TRANSFORMER_ENGINE = "2.12.0"


@dataclass(frozen=True)
class Platform:
    """One rank's device and the backend of its process groups."""

    device: torch.device
    backend: str
    """`nccl` or `gloo`."""
    name: str
    """The hardware's own name, `cpu` for a CPU."""
    _peaks: dict[torch.dtype, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_gpu(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def has_transformer_engine(self) -> bool:
        """Return whether Transformer Engine's layers run on this device."""
        return self.is_gpu and have_transformer_engine()

    @property
    def missing_for_transformer_engine(self) -> str | None:
        """Return why Transformer Engine's layers do not run on this device; None if they do."""
        if self.has_transformer_engine:
            return None
        if not self.is_gpu:
            return "needs a GPU, found none"
        return f"needs Transformer Engine {OLDEST_TRANSFORMER_ENGINE} or newer, which does not import here"

    @property
    def peak_flops(self) -> float | None:
        """Return the dense bf16 operations per second by the data sheet; None for one that is not listed (a CPU)."""
        for part, tflops in PEAK_BF16_TFLOPS.items():
            if part in self.name:
                return tflops * 1e12
        return None

    def synchronize(self) -> None:
        """Wait until the device has done all queued work."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def record_event(self) -> Any:
        """Record an event behind the device's queued work (on a CPU the time) and return it, for `elapsed_seconds`."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two events; on a GPU only after `synchronize`."""
        return float(first.elapsed_time(last) / 1e3 if self.is_gpu else last - first)

    def measured_peak_flops(self, dtype: torch.dtype) -> float:
        """Return the operations per second of a large matrix product on this device, the reference for a CPU's speed.

        It is measured once per process, so that all figures are relative to the same value.
        """
        if dtype in self._peaks:
            return self._peaks[dtype]
        n = 8192 if self.is_gpu else 1024
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        best = float("inf")
        end = time.perf_counter() + 1.0
        for number in range(8):
            # a CPU without 16-bit instructions takes seconds for one product
            if number > 1 and time.perf_counter() > end:
                break
            self.synchronize()
            began = time.perf_counter()
            torch.mm(a, b)
            self.synchronize()
            best = min(best, time.perf_counter() - began)
        self._peaks[dtype] = 2 * n**3 / best
        return self._peaks[dtype]

    def reset_peak_memory(self) -> None:
        """Reset the peak of allocated memory on a GPU; the peak of a process's resident set cannot be reset."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int:
        """Return the peak of memory allocated on the GPU, or of the process's resident set."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def check_precision(self, name: str) -> None:
        """Raise UserError for a precision that this hardware or installation cannot run."""
        recipe = PRECISIONS[name].fp8_recipe
        if recipe is None:
            return
        reason = self.missing_for_transformer_engine or _unsupported_recipe(recipe)
        if reason:
            raise UserError(f"precision.name: {name} {reason}; the nearest that runs is bf16")

    def check_offload(self, layers: int) -> None:
        """Raise UserError for offloaded activations if Transformer Engine, which moves them, does not run."""
        if layers and (reason := self.missing_for_transformer_engine):
            raise UserError(f"parallel.offload_layers: {layers} {reason}; parallel.recompute=full saves memory too")

    def check_tp_overlap(self, wanted: bool) -> None:
        """Raise UserError for overlapped tensor parallelism if Transformer Engine, which does it, does not run."""
        if wanted and (reason := self.missing_for_transformer_engine):
            raise UserError(f"parallel.tp_overlap: {reason}; parallel.tp_overlap=false computes the same")

    def check_graph(self, attention: str) -> None:
        """Raise UserError for CUDA graphs without CUDA or with an attention kernel that cannot be captured."""
        if not self.is_gpu:
            raise UserError("runtime.cuda_graph: needs a GPU, found none; runtime.cuda_graph=false computes the same")
        if attention not in KERNELS:
            raise UserError(
                f"runtime.cuda_graph=true cannot capture the attention kernel {attention}, which runs here; it needs"
                f" one of {', '.join(KERNELS)} (runtime.attention)"
            )

    def make_deterministic(self) -> None:
        """Allow only kernels that repeat bit for bit, as CPU kernels do at a fixed number of threads."""
        if self.is_gpu:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # core accepts no other value
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
            # read when communicators are made, so it must be set before the rendezvous
            os.environ.setdefault("NCCL_ALGO", "^NVLS")
            torch.use_deterministic_algorithms(True)


def gpu_count() -> int:
    """Return the number of GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_name() -> str:
    """Return torch's name of the device that other libraries should use on this host: `cuda` or `cpu`."""
    return "cuda" if gpu_count() else "cpu"


def detect(wanted: str = "auto", local_rank: int = 0) -> Platform:
    """Return the platform of this rank.

    Args:
        wanted: `auto`, `cpu` or `gpu`.
        local_rank: index of this rank on its host.

    Raises:
        UserError: `gpu` was requested and there is none.
        RankError: this host has fewer GPUs than local ranks.
    """
    # read when CUDA starts: lets communication begin before the products it overlaps with, as core and TE require
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if wanted == "cpu":
        # core uses CUDA wherever torch sees it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available():
        count = torch.cuda.device_count()
        # SLURM binds a GPU to each task, which then sees no other
        if count == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0
        if local_rank >= count:
            raise RankError(f"local rank {local_rank}: this host has {count} GPUs; start at most one rank per GPU")
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl", torch.cuda.get_device_name(local_rank))
    if wanted == "gpu":
        raise UserError(
            "runtime.device=gpu: this host has no GPU that torch can use; set runtime.device=cpu to train on the CPU"
        )
    from megatron_ettin.platform import cpu

    cpu.install()
    return Platform(torch.device("cpu"), "gloo", "cpu")


def have_transformer_engine() -> bool:
    """Return whether there is a GPU, and Transformer Engine imports and is new enough for a window on both sides."""
    try:
        import transformer_engine
        import transformer_engine.pytorch
    # its empty meta package raises RuntimeError
    except Exception:
        return False
    return torch.cuda.is_available() and Version(transformer_engine.__version__) >= Version(OLDEST_TRANSFORMER_ENGINE)


def _unsupported_recipe(recipe: str) -> str | None:
    """Return Transformer Engine's reason why this GPU cannot run an FP8 recipe; None if it can."""
    from transformer_engine.pytorch import quantization

    check = {
        "mxfp8": quantization.is_mxfp8_available,
        "blockwise": quantization.is_fp8_block_scaling_available,
    }.get(recipe, quantization.is_fp8_available)
    available, reason = check(return_reason=True)
    return None if available else f"does not run here ({reason})"


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy `tensor` to `device` without waiting for the device.

    A copy from pageable memory would wait for all kernels before it. One from pinned memory is queued behind them, and
    torch's host allocator keeps the memory until it is done.
    """
    if torch.device(device).type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
