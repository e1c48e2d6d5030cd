"""The module `transformer_engine_torch`: enumerations that TE's Python reads, and the functions it calls."""

from __future__ import annotations

import enum
import re
import types
from pathlib import Path
from typing import Any

from tests.emulated_te import attention, norms, products, quantize

ENUMERATIONS = {
    "DType": "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat8E8M0 kFloat4E2M1",
    # indices of a linear's tensors in the state of delayed scaling
    "FP8FwdTensors": " ".join(f"GEMM{i}_{name}" for i in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")),
    "FP8BwdTensors": " ".join(f"GRAD_{name}{i}" for i in (1, 2, 3) for name in ("OUTPUT", "INPUT")),
    "NVTE_QKV_Format": "NVTE_BSHD NVTE_SBHD NVTE_THD NVTE_SBHD_2BSHD NVTE_BSHD_2SBHD NVTE_THD_2BSHD NVTE_THD_2SBHD",
    "NVTE_QKV_Layout": (
        "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D"
        " NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D"
        " NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD"
        " NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD"
        " NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD"
    ),
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": (
        "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK"
        " NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK"
    ),
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_Fused_Attn_Backend": "NVTE_F16_max512_seqlen NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend",
    "CommOverlapType": "RS AG",
    "CommOverlapAlgo": "BULK_OVERLAP_AG BULK_OVERLAP_RS",
}


class _Absent:
    """Stub of a communication class that needs a device; TE's annotations name it, nothing here instantiates it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("userbuffers are not emulated")


def make(te: Path) -> types.ModuleType:
    """Build the module for the package transformer_engine in `te`; functions that are not emulated raise when called."""
    module = types.ModuleType("transformer_engine_torch", "emulated on a CPU")
    for name, members in ENUMERATIONS.items():
        setattr(module, name, enum.IntEnum(name, members.split(), start=0))
    for name in ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper"):
        setattr(module, name, type(name, (_Absent,), {}))
    for part in (attention, norms, products, quantize):
        for name in part.KERNELS:
            setattr(module, name, getattr(part, name))
    module.get_cublasLt_version = lambda: 130100  # type: ignore[attr-defined]
    module.get_cudnn_version = lambda: 91900  # type: ignore[attr-defined]
    module.get_num_cublas_streams = lambda: 4  # type: ignore[attr-defined]
    # TE's tables list them, and `import *` takes what is there
    for name in sorted(_named_in(te)):
        if name not in vars(module):
            setattr(module, name, _refusal(name))
    module.__getattr__ = _refusal  # type: ignore[attr-defined, method-assign]
    return module


def _named_in(te: Path) -> set[str]:
    """Return the functions of the extension that TE's Python names."""
    text = "\n".join(path.read_text() for path in (te / "pytorch").rglob("*.py"))
    return set(re.findall(r"\btex\.([a-z]\w*)", text))


def _refusal(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

    return refuse
