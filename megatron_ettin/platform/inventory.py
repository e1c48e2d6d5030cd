"""What of GPUs and of the packages that make them fast is on this machine, as plain values. Importing none of the
packages, unless asked to: an import of Transformer Engine or DeepSpeed takes seconds."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_ettin.base.errors import first_line

GIB = float(1 << 30)


@dataclass(frozen=True)
class Gpu:
    """One that torch sees. `supported`: whether this torch has kernels for it."""

    name: str
    memory_gib: float
    capability: str  # "9.0"
    supported: bool


def gpus() -> list[Gpu]:
    """Those that torch sees; an empty list where it sees none, whatever the reason."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        part = torch.cuda.get_device_properties(index)
        runs = has_kernels(torch.cuda.get_arch_list(), part.major, part.minor)
        found.append(Gpu(part.name, part.total_memory / GIB, f"{part.major}.{part.minor}", runs))
    return found


def has_kernels(built_for: list[str], major: int, minor: int) -> bool:
    """Whether one of torch's architectures runs on this capability: machine code of the same generation that is not
    newer, or intermediate code that is not newer."""
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
    """The CUDA that torch is built for; None: for CPUs."""
    return torch.version.cuda


def driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of NVIDIA's kernel module; None where none is loaded."""
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", proc.read_text())
        return match[1] if match else "unknown"
    return None


def collectives() -> str:
    """The library that ranks talk by on GPUs and its version, and those without one."""
    if torch.cuda.is_available():
        return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[arg-type]
    return "gloo" if torch.distributed.is_gloo_available() else "none"


def has_infiniband(folder: Path = Path("/sys/class/infiniband")) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def apex_kind() -> str | None:
    """`nvidia`, `other` (PyPI's package of that name is a toolkit for web sites), or None where neither is there."""
    if find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return "nvidia"
    found = find_spec("apex")
    if found is None:
        return None
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    return "nvidia" if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders) else "other"


def apex_adds_gradients() -> bool:
    """Whether Apex is built with the one part that is used here: products that add to a weight's gradient."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_engine_error() -> str | None:
    """Why it cannot be imported, None where it can. Seconds."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # its empty package raises RuntimeError
        return f"{type(error).__name__}: {first_line(error)[:160]}"
    return None


def core_error() -> str | None:
    """Why Megatron-Core cannot be imported, None where it can. Seconds."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every optional package it does not find
        try:
            import megatron.core.tensor_parallel  # noqa: F401
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)[:160]}"
    return None


def core_helper_compiled() -> bool:
    """Whether Megatron-Core's own dataset helper is compiled, which nothing here uses."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("megatron-core") or []
        return any("helpers_cpp" in file.name and file.suffix == ".so" for file in files)
    return False


def visible_devices() -> str | None:
    """What the environment says of the GPUs that may be seen; None: nothing."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
