"""The choice of the attention kernel, on a simulated GPU machine without optional packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.recipe import recipe
from megatron_ettin.config.tables import PRECISIONS, SIZES, tensor_parallel_degrees
from megatron_ettin.platform import device, layers
from megatron_ettin.platform.device import Platform
from megatron_ettin.platform.layers import choose_attention

CPU = Platform(torch.device("cpu"), "gloo", "cpu")
GPU = Platform(torch.device("cuda", 0), "nccl", "a GPU")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    monkeypatch.setattr(device, "have_transformer_engine", lambda: False)


def test_choose_attention_auto_takes_first_that_runs_with_reason() -> None:
    chosen = choose_attention("auto", CPU, "bf16")
    assert chosen.name == "sdpa"
    assert "te-fused needs a GPU, found none" in chosen.why
    # this torch has varlen_attn, nothing else is installed
    chosen = choose_attention("auto", GPU, "bf16")
    assert chosen.name == "varlen"
    assert "te-fused needs Transformer Engine" in chosen.why
    assert "sdpa" not in chosen.why
    assert choose_attention("auto", GPU, "fp32").name == "sdpa"


def test_choose_attention_unavailable_kernel_is_refused_with_nearest() -> None:
    assert choose_attention("sdpa", GPU, "bf16").why == "requested"
    with pytest.raises(UserError, match=r"^runtime\.attention: varlen has no fp32; the nearest that runs is sdpa$"):
        choose_attention("varlen", GPU, "fp32")
    with pytest.raises(UserError, match="flex needs Triton, which is not installed; the nearest that runs is varlen"):
        choose_attention("flex", GPU, "bf16")


def test_precision_docs_table_matches_tensor_parallel_degrees() -> None:
    text = Path(__file__).parents[2].joinpath("docs/precision.md").read_text()
    for size in SIZES:
        model = recipe(size, "mlm", "pretrain").model
        cells = []
        for name in ("bf16", "fp8-current", "fp8-blockwise", "mxfp8"):
            multiple = PRECISIONS[name].multiple
            widths = (model.hidden_size, model.ffn_hidden_size)
            fits = [tp for tp in tensor_parallel_degrees(model) if all(w % (multiple * tp) == 0 for w in widths)]
            cells.append(" ".join(map(str, fits)) or "none")
        assert re.search(rf"^\| {size} \| {' . '.join(map(re.escape, cells))} \|$", text, re.MULTILINE), (size, cells)
