"""Install the emulated Transformer Engine, so that this process has Transformer Engine and no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from tests.emulated_te import extension
from tests.emulated_te.gathering import gather_one_by_one

# modules of TE that need packages we do not install: exports to ONNX, and Triton kernels (mixtures of experts, MXFP8)
LEFT_OUT = ("onnx_extensions", "triton", "triton.pad", "triton.permutation", "triton.cross_entropy")
HOPPER, BLACKWELL = (9, 0), (10, 0)
# environment variables of each process that computes with the emulation
VARIABLES = {
    # keeps TE from loading its compiled libraries
    "NVTE_PROJECT_BUILDING": "1",
    # set as runtime.deterministic sets it on a device
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # DeepSpeed's own detection would look for a device
    "DS_ACCELERATOR": "cpu",
}


def install(folder: Path, capability: tuple[int, int] = HOPPER) -> None:
    """Install the emulation; call it before anything imports core, which looks for TE once.

    `folder` holds TE's Python (its wheel, unpacked). `capability` is the simulated device's: MXFP8 needs BLACKWELL."""
    sys.path.insert(0, str(folder))
    os.environ.update(VARIABLES)
    sys.modules["transformer_engine_torch"] = extension.make(folder / "transformer_engine")
    for name in LEFT_OUT:
        sys.modules[f"transformer_engine.pytorch.{name}"] = MagicMock()
    common = _load_common(folder)
    common.load_framework_extension = lambda _: None
    _answer_for_a_device(capability)
    import transformer_engine.pytorch

    # Python sets this where the parent is imported first
    transformer_engine.common = common
    from megatron_ettin.platform import cpu, device

    cpu.install()
    _random_states_are_the_cpus()
    _tensors_are_on_cuda()
    torch.cuda.is_available = lambda: True
    device.have_transformer_engine = lambda: True
    device.Platform.has_transformer_engine = property(lambda self: True)  # type: ignore[assignment]
    _build_as_on_a_gpu()
    gather_one_by_one()


def _load_common(folder: Path) -> Any:
    """Load transformer_engine.common before its parent package, which imports everything."""
    common_folder = folder / "transformer_engine" / "common"
    spec = importlib.util.spec_from_file_location(
        "transformer_engine.common", common_folder / "__init__.py", submodule_search_locations=[str(common_folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine.common"] = module
    spec.loader.exec_module(module)
    return module


def _answer_for_a_device(capability: tuple[int, int]) -> None:
    cuda: Any = torch.cuda
    major, minor = capability
    device = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=132, name="emulated", total_memory=80 << 30
    )
    cuda.get_device_properties = lambda *_: device
    cuda.get_device_capability = lambda *_: capability
    torch.version.cuda = "13.0"
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.Event = _InOrder
    cuda.current_stream = lambda *_: _InOrder()
    cuda.stream = lambda _: nullcontext()


class _InOrder:
    """Stub of a CUDA stream or event; everything runs in the order of the calls."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, last: _InOrder) -> float:
        return (last.at - self.at) * 1e3

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


def _build_as_on_a_gpu() -> None:
    """Let TE initialize weights as on a GPU, instead of core on the host."""
    from megatron_ettin.train import setup

    plain = setup.transformer_config
    setup.transformer_config = lambda config, backend, layout, on_gpu: plain(config, backend, layout, True)


def _random_states_are_the_cpus() -> None:
    """Replace the CUDA random states that TE keeps around recomputation by the CPU's."""
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _tensors_are_on_cuda() -> None:
    from megatron_ettin.platform.cpu import CudaMeansCpu

    plain = CudaMeansCpu.__torch_function__
    is_cuda = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]

    def answer(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func == is_cuda else plain(self, func, types, args, kwargs)

    run_backward = torch.autograd._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        # torch disables the mode during `backward`, but TE's backward passes also read `is_cuda`
        with CudaMeansCpu():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_in_mode

    CudaMeansCpu.__torch_function__ = answer  # type: ignore[method-assign]
