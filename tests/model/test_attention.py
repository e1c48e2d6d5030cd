"""Three attention kernels against a masked softmax that is written out."""

from __future__ import annotations

import pytest
import torch

from megatron_ettin.model.attention import (
    KernelAttention,
    allowed,
    attend_bands,
    attend_chunks,
    attend_dense,
    attend_flex,
    window_sides,
)
from megatron_ettin.model.config import EttinTransformerConfig
from tests.model.rows import pack_rows

ROWS = {
    "one chunk": [[200], [200]],
    "several": [[63, 64, 65], [1, 150, 40]],
    "with a tail": [[100], [30, 20]],
    "empty row": [[], [200]],
}


def reference(q, k, v, lengths, seq_len, window, causal):
    """Compute softmax(q k^T / sqrt(d)) v over the keys that each query may see, one query at a time."""
    out = torch.zeros_like(q)
    begin = 0
    for row in lengths:
        chunks = [*row, seq_len - sum(row)] if sum(row) < seq_len else row
        for length in chunks:
            for i in range(length):
                low = 0 if window is None else max(0, i - (window - 1 if causal else window))
                high = i + 1 if causal else (length if window is None else min(length, i + window + 1))
                keys = slice(begin + low, begin + high)
                scores = torch.einsum("hd,khd->hk", q[begin + i], k[keys]) / q.shape[-1] ** 0.5
                out[begin + i] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[keys])
            begin += length
    return out


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5, 64, 65, 130])
def test_attend_dense_chunks_and_bands_match_masked_softmax(rows: str, causal: bool, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(400, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = reference(q, k, v, ROWS[rows], 200, window, causal)
    packed = pack_rows(ROWS[rows], 200)
    actual = {"dense": attend_dense(q, k, v, packed, window, causal)}
    if window is None:
        actual["chunks"] = attend_chunks(q, k, v, packed, causal)
    else:
        actual["bands"] = attend_bands(q, k, v, packed, window, causal)
    for way, out in actual.items():
        assert torch.allclose(out, expected, atol=1e-12), way


@pytest.mark.parametrize("rows", ["several", "with a tail"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5, pytest.param(130, marks=pytest.mark.full)])
def test_attend_flex_forward_matches_attend_dense(
    monkeypatch: pytest.MonkeyPatch, rows: str, causal: bool, window: int | None
) -> None:
    """Only the forward pass, uncompiled: backward exists on GPUs only (tools/gpu_validate.py)."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("megatron_ettin.model.attention._flex", lambda: flex_attention)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(400, 2, 16, generator=generator) for _ in range(3))
    packed = pack_rows(ROWS[rows], 200)
    expected = attend_dense(q, k, v, packed, window, causal)
    assert torch.allclose(attend_flex(q, k, v, packed, window, causal), expected, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 64, 65])
def test_window_sides_match_allowed_mask(causal: bool, window: int | None) -> None:
    """Compare flash-attention's (left, right), both inclusive, -1 for no limit, with `allowed`."""
    left, right = window_sides(window, causal)
    query, key = torch.arange(200)[:, None], torch.arange(200)[None]
    seen = (left < 0) | (query - key <= left)
    seen = seen & ((right < 0) | (key - query <= right))
    assert torch.equal(seen, allowed(query, key, window, causal))


@pytest.mark.parametrize("causal", [False, True])
def test_attend_bands_gradients_match_attend_dense(causal: bool) -> None:
    packed = pack_rows([[90, 110], [200]], 200)
    grads = []
    for way in (attend_dense, attend_bands):
        q, k, v = (
            torch.randn(400, 2, 8, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(3)
        )
        (way(q, k, v, packed, 20, causal) ** 2).sum().backward()
        grads.append([t.grad for t in (q, k, v)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("seq_len", [150, 200])
def test_attention_hybrid_micro_batch_matches_its_parts_separately(layer: int, seq_len: int) -> None:
    """The first rows are causal, the others bidirectional, each with its window; compare with each part computed alone."""
    config = EttinTransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, hybrid=True)
    config.attention_windows = {True: 7, False: 20}
    attention = KernelAttention(config, layer)
    lengths = [[90, seq_len - 90], [seq_len - 10], [], [60, 5, seq_len - 65]]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4 * seq_len, 2, 8, generator=generator) for _ in range(3))
    together = attention(q, k, v, None, packed_seq_params=pack_rows(lengths, seq_len, causal_tokens=seq_len))
    for rows, causal in ((slice(0, 1), 1), (slice(1, 4), 0)):
        tokens = slice(rows.start * seq_len, rows.stop * seq_len)
        part = [t[tokens] for t in (q, k, v)]
        alone, other = (
            attention(*part, None, packed_seq_params=pack_rows(lengths[rows], seq_len, causal_tokens=count * seq_len))
            for count in (causal, 0 if causal else 3)
        )
        assert torch.allclose(together[tokens], alone, atol=1e-6)
        assert not torch.allclose(together[tokens], other, atol=1e-2)
