"""What this machine trains on: a `Platform` value that the floors above ask instead of asking torch.cuda.

`detect("auto")` takes the GPU where there is one. On the CPU the same Megatron-Core runs over gloo, with the few CUDA
calls it makes answered by `platform.cpu`.

Host to device without waiting for the device."""

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

# dense bf16 peak of the parts people train on, TFLOP/s (vendors' data sheets, without sparsity)
PEAK_BF16_TFLOPS = {
    **{"H100 PCIe": 756.0, "H100 NVL": 835.5},  # before the H100 that any other name means
    **{"H100": 989.4, "H200": 989.4, "B200": 2250.0, "A100": 312.0, "L40S": 362.0},
}
OLDEST_TRANSFORMER_ENGINE = "2.12.0"  # the first whose fused attention takes keys on both sides of a window


@dataclass(frozen=True)
class Platform:
    """One rank's device and the backend its process groups use."""

    device: torch.device
    backend: str
    name: str  # what the hardware calls itself
    _peaks: dict[torch.dtype, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_transformer_engine(self) -> bool:
        """Whether Transformer Engine's layers run here."""
        return self.is_gpu and have_transformer_engine()

    @property
    def missing_for_transformer_engine(self) -> str | None:
        """Why its layers do not run here; None where they do."""
        if self.has_transformer_engine:
            return None
        if not self.is_gpu:
            return "needs a GPU, found none"
        return f"needs Transformer Engine {OLDEST_TRANSFORMER_ENGINE} or newer, which does not import here"

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 operations a second by the data sheet; None where no table has it (a CPU)."""
        for part, tflops in PEAK_BF16_TFLOPS.items():
            if part in self.name:
                return tflops * 1e12
        return None

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def record_event(self) -> Any:
        """Now, in the order of the device's work: for `elapsed_seconds`."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """Of two moments; on a GPU once it is synchronized."""
        return first.elapsed_time(last) / 1e3 if self.is_gpu else last - first

    def measured_peak_flops(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product here: what a CPU's speed is divided by. Measured once, so that
        all that a process divides by it can be compared."""
        if dtype not in self._peaks:
            self._peaks[dtype] = self._measure_peak_flops(dtype)
        return self._peaks[dtype]

    def _measure_peak_flops(self, dtype: torch.dtype) -> float:
        n = 8192 if self.is_gpu else 1024
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(8):
            self.synchronize()
            began = time.perf_counter()
            torch.mm(a, b)
            self.synchronize()
            best = min(best, time.perf_counter() - began)
        return 2 * n**3 / best

    def forget_peak_memory(self) -> None:
        """Count from here; a process's resident set cannot be counted anew."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: allocated on the GPU, or the process's resident set."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def check_precision(self, name: str) -> None:
        """Refuse a precision that this hardware or installation cannot run. Raises UserError."""
        recipe = PRECISIONS[name].fp8_recipe
        if recipe is None:
            return
        reason = self.missing_for_transformer_engine or _unsupported_recipe(recipe)
        if reason:
            raise UserError(f"precision.name: {name} {reason}; the nearest that runs is bf16")

    def check_offload(self, layers: int) -> None:
        """Refuse activations in host memory where nothing moves them there. Raises UserError."""
        if layers and (reason := self.missing_for_transformer_engine):
            raise UserError(f"parallel.offload_layers: {layers} {reason}; parallel.recompute=full saves memory too")

    def check_tp_overlap(self, wanted: bool) -> None:
        """Refuse overlapped tensor parallelism where nothing does it. Raises UserError."""
        if wanted and (reason := self.missing_for_transformer_engine):
            raise UserError(f"parallel.tp_overlap: {reason}; parallel.tp_overlap=false computes the same")

    def check_graph(self, wanted: bool, attention: str) -> None:
        """Refuse CUDA graphs where there is no CUDA, or attention that cannot be in them. Raises UserError."""
        if wanted and not self.is_gpu:
            raise UserError("run.cuda_graph: needs a GPU, found none; run.cuda_graph=false computes the same")
        if wanted and attention not in KERNELS:
            raise UserError(
                f"run.cuda_graph: goes not with attention by {attention}, which is what runs here; it wants one of"
                f" {', '.join(KERNELS)}"
            )

    def make_deterministic(self) -> None:
        """Only kernels that repeat bit for bit. CPU kernels do so already at a fixed number of threads."""
        if self.is_gpu:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # core takes no other value for an answer
            os.environ.setdefault("NCCL_ALGO", "^NVLS")  # read when communicators are made: before the rendezvous
            torch.use_deterministic_algorithms(True)


def gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_name() -> str:
    """What torch calls the device that other libraries should use here."""
    return "cuda" if gpu_count() else "cpu"


def detect(wanted: str = "auto", local_rank: int = 0) -> Platform:
    """The platform of this rank. `wanted`: `auto`, `cpu` or `gpu`. Raises UserError for an absent GPU."""
    # read when CUDA starts: communication begins before the products that it is to run beside, as core and TE want it
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: core uses CUDA wherever it is available
    elif torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0  # SLURM binds a GPU to each task, which then sees no other
        if local_rank >= count:
            raise RankError(f"local rank {local_rank}: this machine has {count} GPUs; start at most one rank for each")
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl", torch.cuda.get_device_name(local_rank))
    if wanted == "gpu":
        raise UserError("run.device: gpu was asked for and none was found; run.device=cpu trains on the processor")
    from megatron_ettin.platform import cpu

    cpu.install()
    return Platform(torch.device("cpu"), "gloo", "cpu")


def have_transformer_engine() -> bool:
    """Whether Transformer Engine imports and is new enough for a window on both sides. Not only ImportError: its empty
    meta package raises RuntimeError."""
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except Exception:
        return False
    return torch.cuda.is_available() and Version(transformer_engine.__version__) >= Version(OLDEST_TRANSFORMER_ENGINE)


def _unsupported_recipe(recipe: str) -> str | None:
    """Transformer Engine's own reason why this GPU cannot run an FP8 recipe, None where it can."""
    from transformer_engine.pytorch import quantization

    ask = {
        "mxfp8": quantization.is_mxfp8_available,
        "blockwise": quantization.is_fp8_block_scaling_available,
    }.get(recipe, quantization.is_fp8_available)
    available, reason = ask(return_reason=True)
    return None if available else f"does not run here ({reason})"


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. A copy from ordinary memory would wait for all kernels before it; one from page-locked
    memory is queued behind them, and torch's host allocator keeps the memory until it is done."""
    if torch.device(device).type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
