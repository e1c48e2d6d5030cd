"""GPU models: a file of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.plan.hardware import find_gpu
from tests.plan.test_search import plan


def test_gpus_file_defines_own_gpu_and_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    keys = (
        "fp8_tflops: 0, memory_gib: 96, memory_tb_per_s: 4, link_gb_per_s: 100, network_gb_per_s: 25, gpus_per_node: 4"
    )
    path.write_text(f"mine: {{bf16_tflops: 500, {keys}}}\n")
    answer = plan(capsys, "--size", "17m", "--gpus", "4", "--gpu", "mine", "--gpus-file", str(path))
    assert answer["gpu"]["memory_gib"] == 96
    assert answer["layouts"]
    path.write_text(f"mine: {{bf16_tflops: fast, {keys}}}\n")
    with pytest.raises(UserError, match=r"mine\.bf16_tflops: 'fast' is not a number above 0"):
        find_gpu("mine", path)
    path.write_text("mine: {bf16_tflops: 500}\n")
    with pytest.raises(UserError, match="mine: needs bf16_tflops, fp8_tflops"):
        find_gpu("mine", path)
