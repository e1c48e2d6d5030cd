"""The chunked output layer against torch's cross entropy; tests of layouts cover a vocabulary split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron_ettin.model import loss


def tensors(n: int, vocabulary: int = 300, hidden: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    x, w = torch.randn(n, hidden, generator=generator), torch.randn(vocabulary, hidden, generator=generator)
    b, y = torch.randn(vocabulary, generator=generator), torch.randint(0, vocabulary, (n,), generator=generator)
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), y


@pytest.fixture(params=["in chunks", "fused"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Return the loss by both implementations; the functions for torch.compile run uncompiled."""
    with mock.patch.object(loss, "compile_enabled", lambda: request.param == "fused"):
        yield


@pytest.mark.parametrize("n", [1, 63, 64, 200])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_linear_cross_entropy_matches_torch_loss_and_gradients(n: int, scale: float, way: None) -> None:
    x, w, b, y = tensors(n)
    logits = x @ w.t() + b
    expected = F.cross_entropy(logits, y, reduction="none")
    wanted = torch.autograd.grad(expected.sum() * scale, [x, w, b])
    # 64 rows per chunk
    with mock.patch.object(loss, "CHUNK_LOGITS_BYTES", 64 * 300 * 4):
        total, losses, _ = loss.linear_cross_entropy(x, w, b, y)
    assert torch.allclose(losses, expected, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(loss.linear_cross_entropy(x, w, b, y)[2], logits.argmax(1) == y)
    for actual, want in zip(torch.autograd.grad(total * scale, [x, w, b]), wanted, strict=True):
        assert torch.allclose(actual, want, atol=1e-4)


@pytest.mark.parametrize("labels", [255, 253])
def test_linear_cross_entropy_in_bf16_scales_gradients_by_unrounded_factor(labels: int, way: None) -> None:
    """The factor 1 / labels must not be rounded to bf16, which would make it 0.39 and 0.37 % too large."""
    factor, norms = 1 / labels, {}
    for scale in (1.0, factor):
        x, w, b, y = (t.bfloat16() if t.is_floating_point() else t for t in tensors(2000))
        total, _, _ = loss.linear_cross_entropy(x, w, b, y, loss.LossOptions(factor=scale))
        norms[scale] = [gradient.double().norm() for gradient in torch.autograd.grad(total * scale, [x, w, b])]
    for unscaled, scaled, close in zip(norms[1.0], norms[factor], (1e-4, 5e-4, 2e-3), strict=True):
        assert float(scaled / unscaled) == pytest.approx(factor, rel=close)


def test_linear_cross_entropy_without_labels_is_zero(way: None) -> None:
    x, w, b, y = tensors(0)
    total, losses, correct = loss.linear_cross_entropy(x, w, b, y)
    assert total.item() == 0
    assert losses.shape == (0,)
    assert correct.shape == (0,)
    assert all(not g.any() for g in torch.autograd.grad(total, [w, b]))


def test_linear_cross_entropy_padding_columns_have_no_probability(way: None) -> None:
    x, w, b, _ = tensors(20)
    y = torch.randint(0, 290, (20,))
    _, losses, _ = loss.linear_cross_entropy(x, w, b, y, loss.LossOptions(first=0, valid=290))
    assert torch.allclose(losses, F.cross_entropy((x @ w.t() + b)[:, :290], y, reduction="none"), atol=1e-5)


def test_linear_cross_entropy_largest_tensor_is_one_chunk() -> None:
    """The largest tensor is that of one chunk of logits, whatever the number of labels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    x, w, b, y = tensors(2000)
    with mock.patch.object(loss, "CHUNK_LOGITS_BYTES", 200 * 300 * 4), Largest() as largest:
        loss.linear_cross_entropy(x, w, b, y)[0].backward()
    assert largest.elements <= 200 * 300
