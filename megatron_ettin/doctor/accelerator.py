"""Check GPUs, their driver and libraries, and the packages that make them fast. Report the cost of an absence."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from packaging.version import Version

from megatron_ettin.base.versions import version_of
from megatron_ettin.doctor.findings import Finding, note, ok, problem, warning
from megatron_ettin.platform import inventory
from megatron_ettin.platform.device import OLDEST_TRANSFORMER_ENGINE

NOT_HERE = "of no use without a GPU"


def accelerator_findings(quick: bool, wanted_gpus: int | None = None) -> list[Finding]:
    """Return all findings about GPUs and their packages.

    Args:
        quick: whether to skip imports that take seconds.
        wanted_gpus: number of GPUs that torch must see; another number is a problem. None accepts any number.
    """
    seen = inventory.gpus()
    return [
        *_gpus(seen, wanted_gpus),
        _driver(bool(seen)),
        ok("collectives", inventory.collectives()),
        _core(quick),
        _helper(),
        _transformer_engine(bool(seen), quick),
        _apex(bool(seen)),
        _flash_attention(bool(seen)),
        _deepspeed(),
        _compiler(bool(seen)),
    ]


def _gpus(seen: list[inventory.Gpu], wanted: int | None) -> list[Finding]:
    findings, mask = [], os.environ.get("CUDA_VISIBLE_DEVICES")
    for gpu in sorted(set(seen), key=lambda gpu: gpu.name):
        text = f"{seen.count(gpu)} x {gpu.name}, {gpu.memory_gib:.0f} GiB, capability {gpu.capability}"
        if gpu.supported:
            findings.append(ok("gpu", text, count=seen.count(gpu), model=gpu.name, capability=gpu.capability))
        else:
            why = f"{text}: this torch (CUDA {inventory.torch_build()}) has no kernels for it"
            findings.append(problem("gpu", why, "install a build of torch that has them (https://pytorch.org)"))
    if wanted is not None and len(seen) != wanted:
        seen_by = f" (CUDA_VISIBLE_DEVICES={mask})" if mask is not None else ""
        findings.append(
            problem("gpu", f"torch sees {len(seen)} of {wanted}{seen_by}", "look at `nvidia-smi` and dmesg")
        )
    elif not seen and inventory.driver() is not None and mask != "":
        if inventory.torch_build() is None:
            text, todo = "there are GPUs, but this torch is built for CPUs", "install a build of torch for CUDA"
        else:
            text = f"there is a driver, but torch (CUDA {inventory.torch_build()}) sees no GPU"
            todo = "look at `nvidia-smi`; in a container: was it started with GPUs? is the driver new enough?"
        findings.append(problem("gpu", text, todo))
    elif not seen:
        findings.append(note("gpu", "none; runs here train on the CPU, over gloo", count=0))
    return findings


def _driver(has_gpu: bool) -> Finding:
    version, build = inventory.driver(), inventory.torch_build()
    built = f"torch is built for CUDA {build}" if build else "torch is built for CPUs"
    if version is None:
        return (note if not has_gpu else ok)("driver", f"no NVIDIA kernel module was found; {built}")
    return ok("driver", f"{version}; {built}", version=version, cuda=build)


def _core(quick: bool) -> Finding:
    if quick:
        return note("megatron-core", f"{version_of('megatron-core')}, not imported (--quick)")
    error = inventory.core_error()
    if error is None:
        return ok("megatron-core", "imports")
    todo = "a Transformer Engine that does not load breaks it: pip uninstall transformer-engine, or install 2.12"
    return problem("megatron-core", f"cannot be imported: {error}", todo)


def _helper() -> Finding:
    state = "is compiled" if inventory.core_helper_compiled() else "is not compiled"
    return ok("dataset helper", f"none is needed, nothing is compiled at a start (Megatron-Core's own {state}, unused)")


def _transformer_engine(has_gpu: bool, quick: bool) -> Finding:
    version = version_of("transformer-engine") or version_of("transformer-engine-torch")
    name, cost = "transformer engine", "no FP8, cuDNN attention, tp_overlap, offload_layers; norms and gates unfused"
    if version is None:
        if not has_gpu:
            return ok(name, f"absent; {NOT_HERE}")
        return warning(name, f"absent: {cost}", "bash tools/setup_gpu.sh, or pip install 'megatron-ettin[gpu]'")
    if not has_gpu:
        broken = None if quick else inventory.transformer_engine_error()
        return note(name, f"{version}, {NOT_HERE}" + (f"; it does not import ({broken})" if broken else ""))
    if quick:
        return ok(name, f"{version}, not imported (--quick)", version=version)
    error = inventory.transformer_engine_error()
    if error is not None:
        todo = "reinstall it against this torch (tools/setup_gpu.sh), or uninstall it"
        return warning(name, f"{version} does not import ({error}): {cost}", todo, version=version)
    if Version(version) < Version(OLDEST_TRANSFORMER_ENGINE):
        text = f"{version} is older than {OLDEST_TRANSFORMER_ENGINE} and not used: {cost}"
        return warning(name, text, "pip install 'megatron-ettin[gpu]'", version=version)
    return ok(name, f"{version} imports", version=version)


def _apex(has_gpu: bool) -> Finding:
    """Check that Apex has its fused weight-gradient kernel, which Megatron-Core's own layers use.

    Those layers run in fp32, and in any precision without Transformer Engine. The layers of Transformer Engine
    accumulate weight gradients themselves.
    """
    variant, te = inventory.apex_package(), version_of("transformer-engine")
    has_te = te is not None and Version(te) >= Version(OLDEST_TRANSFORMER_ENGINE)
    if variant == "other":
        text = f"the installed `apex` {version_of('apex') or ''} is not NVIDIA's but PyPI's toolkit for web sites"
        todo = "pip uninstall apex; NVIDIA's comes with its containers or from github.com/NVIDIA/apex, never from PyPI"
        return warning("apex", text, todo)
    is_whole = inventory.apex_adds_gradients()
    state = "NVIDIA's" if is_whole else "absent"
    if variant is not None and not is_whole:
        state = "NVIDIA's, without fused_weight_gradient_mlp_cuda (built without --cuda_ext)"
    if not has_gpu:
        return ok("apex", f"{state}; {NOT_HERE}")
    if has_te:
        return ok("apex", f"{state}; with Transformer Engine only runs in fp32 use it")
    if is_whole:
        return ok("apex", f"{state}: weight gradients are accumulated in the matrix product")
    return note("apex", f"{state}: weight gradients are accumulated in a separate pass")


def _flash_attention(has_gpu: bool) -> Finding:
    version = version_of("flash-attn-3") or version_of("flash-attn")
    there = version or find_spec("flash_attn") or find_spec("flash_attn_interface")
    if there:
        return ok("flash-attn", f"{version or 'there'}" + ("" if has_gpu else f"; {NOT_HERE}"), version=version)
    cost = "absent: attention is Transformer Engine's, else torch's varlen_attn, which is flash attention 2"
    return note("flash-attn", cost) if has_gpu else ok("flash-attn", f"absent; {NOT_HERE}")


def _deepspeed() -> Finding:
    version = version_of("deepspeed")
    if version is None:
        return note("deepspeed", "absent: no parallel.engine=deepspeed (ZeRO-2, ZeRO-3, offload)")
    return ok("deepspeed", version, version=version)


def _compiler(has_gpu: bool) -> Finding:
    cxx = shutil.which("g++") or shutil.which("clang++")
    if has_gpu and find_spec("triton") is None:
        todo = "install torch's own build for CUDA, which brings Triton"
        return warning(
            "compiler", "no Triton: no runtime.compile (element-wise work is a quarter of a bf16 step), nor flex", todo
        )
    if has_gpu:
        return ok("compiler", f"Triton {version_of('triton') or ''}".strip() + (f", {cxx}" if cxx else ""))
    if cxx is None:
        return note("compiler", "no C++ compiler: no runtime.compile=always on the CPU (`auto` does not use it there)")
    return ok("compiler", cxx)
