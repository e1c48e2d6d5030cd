"""Both optimizers against independent references: a short StableAdamW, torch-optimi's, and torch's AdamW."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_ettin.optim import adamw
from megatron_ettin.optim.adamw import DecoupledAdamW, ParamInfo, ShardSlice, StableAdamW
from megatron_ettin.platform.compile import enable_compile

LR, MAX_LR, DECAY, BETAS, EPS, STEPS = 2e-3, 4e-3, 1e-2, (0.9, 0.98), 1e-6, 200
SHAPES = [(16, 8), (40,), (3, 5)]


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    """Draw gradients that are mostly small, with a spike now and then that makes the clip act."""
    generator = torch.Generator().manual_seed(step + 1)
    scale = 30.0 if step % 17 == 5 else 0.1
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def build(
    optimizer_class: type, lr: float = LR, max_lr: float = MAX_LR
) -> tuple[DecoupledAdamW, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(w) for w in weights()]
    groups = [
        {"params": [parameters[0], parameters[2]], "wd_mult": 1.0, "max_lr": max_lr},
        {"params": [parameters[1]], "wd_mult": 0.0, "max_lr": max_lr},
    ]
    optimizer = optimizer_class(groups, lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer.bind(
        {p: [ShardSlice(ParamInfo(i, p.numel(), True))] for i, p in enumerate(parameters)}, len(parameters), None
    )
    return optimizer, parameters


def run(optimizer_class: type, after: Callable[[], None] = lambda: None, **settings: float) -> list[torch.Tensor]:
    optimizer, parameters = build(optimizer_class, **settings)
    for step in range(STEPS):
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.clone()
        optimizer.step()
        after()
    assert optimizer.updates == STEPS
    return [p.detach() for p in parameters]


@functools.cache
def stable() -> list[torch.Tensor]:
    """Return the weights after these gradients by StableAdamW, uncompiled."""
    return run(StableAdamW)


def test_stable_adamw_with_clipping_matches_its_formula() -> None:
    P = [w.double() for w in weights()]
    M, V, clipped = [torch.zeros_like(p) for p in P], [torch.zeros_like(p) for p in P], 0
    for t in range(1, STEPS + 1):
        for i, g in enumerate(gradients(t - 1)):
            g, (b1, b2) = g.double(), BETAS
            M[i] += (1 - b1) / (1 - b1**t) * (g - M[i])
            hat = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
            V[i] = hat * V[i] + (1 - hat) * g * g
            rms = (g * g / V[i].clamp(min=EPS**2)).mean().sqrt().item()
            clipped += rms > 1
            lr = LR / max(1.0, rms)
            P[i] *= 1 - lr / MAX_LR * (DECAY if P[i].ndim > 1 else 0)
            P[i] -= lr * M[i] / (V[i].sqrt() + EPS)
    assert clipped > 20
    for ours, theirs in zip(stable(), P, strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() <= 1e-5


@contextmanager
def fused(backend: str) -> Iterator[None]:
    """Let torch's compiler trace the update, and `backend` compile it."""
    compile_function = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *given, **named: compile_function(*given, backend=backend, **named))
        enable_compile(True)
    torch._dynamo.utils.counters.clear()
    try:
        yield
    finally:
        enable_compile(False)
        torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_compiled(monkeypatch: pytest.MonkeyPatch, backend: str, sizes: Iterable[int]) -> None:
    """Check that clips stay on the device, and that nothing is compiled after the first steps or for other sizes."""
    compiled, expected = [], stable()
    with fused(backend):
        monkeypatch.setattr(torch.Tensor, "tolist", lambda clips: pytest.fail("waits for the device"))
        actual = run(StableAdamW, after=lambda: compiled.append(graphs()))
        for n in sizes:
            (g, m, v), b1, b2 = (torch.rand(n) for _ in range(3)), torch.tensor(0.1), torch.tensor(0.9)
            expected_sum = (g * g / (0.9 * v + 0.1 * g * g)).sum()
            with torch.no_grad():
                torch.testing.assert_close(adamw.update_moments(g, m, v, b1, b2, EPS * EPS), expected_sum)
        last = graphs()
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() <= 1e-5
    assert 2 <= compiled[2] == compiled[-1]
    # torch has another kernel for large tensors on a CPU
    assert last - compiled[-1] <= 2


def test_stable_adamw_traced_matches_eager_without_retracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without compiling and count the traces, because each new trace would be a new compilation."""
    check_compiled(monkeypatch, "eager", (*range(3, 40, 6), 700, 9999, 70_000))


@pytest.mark.full
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch's compiler wants a C++ one")
def test_stable_adamw_compiled_matches_eager_without_recompiling(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled(monkeypatch, "inductor", (*range(3, 40, 2), 700, 4096, 9999, 70_000))


def test_stable_adamw_matches_torch_optimi() -> None:
    import optimi

    parameters = [torch.nn.Parameter(w) for w in weights()]
    groups = [{"params": [parameters[0], parameters[2]]}, {"params": [parameters[1]], "weight_decay": 0.0}]
    theirs = optimi.StableAdamW(
        groups,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        decouple_lr=True,
        max_lr=LR,
        foreach=False,
        triton=False,
    )
    for step in range(STEPS):
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.clone()
        theirs.step()
    for ours, expected in zip(run(StableAdamW, max_lr=LR), parameters, strict=True):
        assert (ours - expected.detach()).abs().max() / expected.abs().max() <= 1e-6


def test_decoupled_adamw_matches_torch_adamw() -> None:
    """torch's decay is lr * coefficient; ours is (lr / max_lr) * coefficient."""
    parameters = [torch.nn.Parameter(w) for w in weights()]
    groups = [{"params": [parameters[0], parameters[2]]}, {"params": [parameters[1]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY / MAX_LR)
    for step in range(STEPS):
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.clone()
        theirs.step()
    for ours, expected in zip(run(DecoupledAdamW), parameters, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer_class", [StableAdamW, DecoupledAdamW])
def test_adamw_first_update_moves_by_learning_rate(optimizer_class: type) -> None:
    """With debiasing, the first step moves every weight by lr against the gradient's sign."""
    optimizer, parameters = build(optimizer_class)
    before = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, gradients(0), strict=True):
        p.grad = g.clone()
    optimizer.step()
    # this parameter is not decayed
    moved = parameters[1].detach() - before[1]
    assert torch.allclose(moved, -LR * torch.sign(parameters[1].grad), rtol=1e-3)
