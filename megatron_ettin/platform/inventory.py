"""List the GPUs of this host and the packages that make them fast, as plain values.

Only `transformer_engine_error` and `core_error` import a large package, which takes seconds.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_ettin.base.errors import first_line

GIB = float(1 << 30)


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    memory_gib: float
    capability: str
    """Compute capability, such as "9.0"."""
    supported: bool
    """True if this torch has kernels for it."""


def gpus() -> list[Gpu]:
    """Return the GPUs that torch sees; an empty list if it sees none."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    built_for = torch.cuda.get_arch_list()
    return [
        Gpu(p.name, p.total_memory / GIB, f"{p.major}.{p.minor}", has_kernels(built_for, p.major, p.minor))
        for p in properties
    ]


def has_kernels(built_for: list[str], major: int, minor: int) -> bool:
    """Return whether one of torch's architectures, such as `sm_90`, runs on this compute capability.

    Machine code (sm) runs on GPUs of its own generation that are not older. Intermediate code (compute) runs on GPUs of
    any generation that are not older.
    """
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        built, special = (int(match[2]), int(match[3])), match[4]
        if special == "a":
            runs = built == (major, minor)
        elif match[1] == "sm" or special:
            runs = built[0] == major and built[1] <= minor
        else:
            runs = built <= (major, minor)
        if runs:
            return True
    return False


def torch_build() -> str | None:
    """Return the CUDA version that torch is built for; None for a CPU build."""
    return torch.version.cuda


def driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's kernel module (`unknown` if it cannot be read); None if none is loaded."""
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", proc.read_text())
        return match[1] if match else "unknown"
    return None


def collectives() -> str:
    """Return the communication library of the ranks: NCCL with its version on GPUs, otherwise gloo or none."""
    if torch.cuda.is_available():
        version: Any = torch.cuda.nccl.version()
        return "NCCL " + ".".join(map(str, version))
    return "gloo" if torch.distributed.is_gloo_available() else "none"


def has_infiniband(folder: Path = Path("/sys/class/infiniband")) -> bool:
    """Return whether this host has an InfiniBand device."""
    return folder.is_dir() and any(folder.iterdir())


def apex_package() -> str | None:
    """Return `nvidia`, `other`, or None if Apex is missing. PyPI's `apex` is a toolkit for web sites: `other`."""
    if find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return "nvidia"
    spec = find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "nvidia" if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders) else "other"


def apex_adds_gradients() -> bool:
    """Return whether Apex has its fused weight-gradient accumulation, the one part that this package uses."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_engine_error() -> str | None:
    """Return why Transformer Engine cannot be imported; None if it can. The import takes seconds."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    # any exception, because the empty package of that name raises RuntimeError
    except Exception as error:
        return _describe(error)
    return None


def core_error() -> str | None:
    """Return why Megatron-Core cannot be imported; None if it can. The import takes seconds."""
    with warnings.catch_warnings():
        # core warns about every optional package that it does not find
        warnings.simplefilter("ignore")
        try:
            import megatron.core.tensor_parallel  # noqa: F401
        except Exception as error:
            return _describe(error)
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:160]}"


def core_helper_compiled() -> bool:
    """Return whether Megatron-Core's own dataset helper is compiled. This package does not use it."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("megatron-core") or []
        return any("helpers_cpp" in file.name and file.suffix == ".so" for file in files)
    return False
