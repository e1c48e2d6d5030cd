"""Measure this device's rates at the shapes of a model's layer: copies, products, FP8 linears, element-wise work.

They are the ceilings that roofline.py divides by, so they are measured, not taken from a data sheet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from gpu_checks.session import DoesNotRunError, Session, median_seconds

FP8 = {"fp8-delayed": "DelayedScaling", "fp8-current": "Float8CurrentScaling", "fp8-blockwise": "Float8BlockScaling"}


def section(session: Session) -> None:
    items: dict[str, Any] = {"device": functools.partial(device, session), "copy": functools.partial(copy, session)}
    for size in session.sizes:
        items[f"{size} products, bf16"] = functools.partial(products, session, size)
        for name in ("bf16", *FP8):
            items[f"{size} linears forward and backward, {name}"] = functools.partial(linears, session, size, name)
        items[f"{size} element-wise"] = functools.partial(element_wise, session, size)
    session.run("rates", items)


def device(session: Session) -> dict[str, Any]:
    """Return the device and versions of this measurement."""
    from importlib.metadata import PackageNotFoundError, version

    packages = ("torch", "transformer-engine", "megatron-core", "flash-attn", "transformers", "triton")
    facts: dict[str, Any] = {}
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    name = "cpu"
    if session.device == "gpu":
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        facts |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gib": properties.total_memory >> 30,
        }
    says = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    return {"says": f"{name}: {says}", "name": name, **facts}


def copy(session: Session) -> dict[str, Any]:
    """Return the bytes read and written per second by a copy far larger than any cache."""
    numel = 2**30 if session.device == "gpu" else 2**24
    a = torch.randn(numel, device=session.torch_device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / median_seconds(lambda: b.copy_(a), session.device, session.rounds)
    return {"says": f"{rate / 1e12:.2f} TB/s", "bytes_per_second": rate}


def shapes(session: Session, size: str) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of a layer's four linears."""
    shape = session.shape(size)
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return {"qkv": (hidden, 3 * hidden), "proj": (hidden, hidden), "fc1": (hidden, 2 * ffn), "fc2": (ffn, hidden)}


def products(session: Session, size: str) -> dict[str, Any]:
    """Return TFLOP/s of the four products of a layer, forward, each and together."""
    tokens, total, seconds, rates = session.tokens_a_step, 0, 0.0, {}
    for name, (inputs, outputs) in shapes(session, size).items():
        x = torch.randn(tokens, inputs, device=session.torch_device, dtype=torch.bfloat16)
        w = torch.randn(inputs, outputs, device=session.torch_device, dtype=torch.bfloat16)
        took = median_seconds(functools.partial(torch.mm, x, w), session.device, session.rounds)
        operations = 2 * tokens * inputs * outputs
        rates[name] = operations / took
        total, seconds = total + operations, seconds + took
    text = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    return {"says": f"{total / seconds / 1e12:.3g} TFLOP/s ({text})", "flops": total / seconds}


def linears(session: Session, size: str, precision: str) -> dict[str, Any]:
    """Return TFLOP/s of Transformer Engine's linear, forward and backward, and its error against float64."""
    if session.device == "cpu":
        raise DoesNotRunError("Transformer Engine's linears need a GPU")
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    recipe_name = FP8.get(precision)
    if recipe_name is not None and not hasattr(recipe, recipe_name):
        raise DoesNotRunError(f"this Transformer Engine has no {recipe_name}")
    scaling = getattr(recipe, recipe_name)() if recipe_name is not None else None
    tokens, total, seconds, errors = session.tokens_a_step, 0, 0.0, []
    for inputs, outputs in shapes(session, size).values():
        torch.manual_seed(0)
        linear = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)

        def forward(linear: Any = linear, x: torch.Tensor = x) -> torch.Tensor:
            with te.fp8_autocast(enabled=scaling is not None, fp8_recipe=scaling):
                return linear(x)

        def step(forward: Any = forward, gradient: torch.Tensor = gradient) -> None:
            forward().backward(gradient)

        # a few passes, in which delayed scaling finds its scales
        step()
        out, expected = forward()[:256].double(), x[:256].double() @ linear.weight.double().t()
        errors.append(((out - expected).norm() / expected.norm()).item())
        took = median_seconds(step, session.device, session.rounds)
        total, seconds = total + 6 * tokens * inputs * outputs, seconds + took
    # largest relative errors on random inputs, for bf16's 8 bits and E4M3's 4
    bound = 0.01 if scaling is None else 0.06
    return {
        "says": f"{total / seconds / 1e12:.3g} TFLOP/s, error {max(errors):.1e}",
        "passed": max(errors) <= bound,
        "flops": total / seconds,
        "error": max(errors),
    }


def element_wise(session: Session, size: str) -> dict[str, Any]:
    """Return the seconds of the work between the products of one layer, forward: eager, and compiled by torch."""
    from megatron_ettin.model.attention import rotate
    from megatron_ettin.model.dropout import add_kept
    from megatron_ettin.model.layer import gated_gelu

    shape, tokens = session.shape(size), session.tokens_a_step
    options = {"device": session.torch_device, "dtype": torch.bfloat16}
    x, residual = (torch.randn(tokens, 1, shape.hidden_size, **options) for _ in range(2))
    inner = torch.randn(tokens, 1, 2 * shape.ffn_hidden_size, **options)
    width = shape.hidden_size // shape.num_attention_heads
    heads = torch.randn(tokens, shape.num_attention_heads, width, **options)
    cos, sin = (torch.randn(tokens, 1, width, **options) for _ in range(2))
    keys = torch.randint(0, 2**31 - 1, (tokens,), device=session.torch_device, dtype=torch.int32)
    calls = {
        "rotation": (rotate, (heads, cos, sin)),
        "gate": (gated_gelu, (inner,)),
        "dropout": (add_kept, (x, residual, keys, 6554, 1.1)),
    }
    figures: dict[str, Any] = {}
    for name, (one, arguments) in calls.items():
        for way, function in (("plain", one.function), ("fused", torch.compile(one.function))):
            took = median_seconds(functools.partial(function, *arguments), session.device, session.rounds)
            figures[f"{name}_{way}_seconds"] = took
    text = ", ".join(
        f"{name} {figures[f'{name}_plain_seconds'] * 1e3:.3g} to {figures[f'{name}_fused_seconds'] * 1e3:.3g} ms"
        for name in calls
    )
    return {"says": text, **figures}
