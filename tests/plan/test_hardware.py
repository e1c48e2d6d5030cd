"""GPU models that a user's file defines."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.plan.hardware import find_gpu
from tests.plan.test_search import plan

KEYS = "fp8_tflops: 0, memory_gib: 96, memory_tb_per_s: 4, link_gb_per_s: 100, network_gb_per_s: 25, gpus_per_node: 4"


def test_gpus_file_defines_own_gpu_and_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(f"mine: {{bf16_tflops: 500, {KEYS}}}\n")
    answer = plan(capsys, "--size", "17m", "--gpus", "4", "--gpu", "mine", "--gpus-file", str(path))
    assert answer["gpu"]["memory_gib"] == 96
    assert answer["layouts"]
    path.write_text(f"mine: {{bf16_tflops: fast, {KEYS}}}\n")
    with pytest.raises(UserError, match=r"mine\.bf16_tflops: 'fast' is not a number above 0"):
        find_gpu("mine", path)
    path.write_text("mine: {bf16_tflops: 500}\n")
    with pytest.raises(UserError, match="mine: needs bf16_tflops, fp8_tflops"):
        find_gpu("mine", path)


@pytest.mark.parametrize(
    ("given", "changed", "message"),
    [
        ("memory_gib: 96", "memory_gib: .inf", r"memory_gib: inf is not a number above 0"),
        ("memory_gib: 96", "memory_gib: .nan", r"memory_gib: nan is not a number above 0"),
        ("memory_gib: 96", "memory_gib: 1.0e+308", r"memory_gib: 1e\+308 is not a number above 0"),
        ("memory_gib: 96", f"memory_gib: {'9' * 400}", r"memory_gib: 9+ is not a number above 0"),
        ("gpus_per_node: 4", "gpus_per_node: 4.5", r"gpus_per_node: 4\.5 is not a whole number"),
    ],
)
def test_gpus_file_figure_that_cannot_be_used_is_refused(
    given: str, changed: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(f"mine: {{bf16_tflops: 500, {KEYS.replace(given, changed)}}}\n")
    with pytest.raises(UserError, match=rf"mine\.{message}"):
        find_gpu("mine", path)
