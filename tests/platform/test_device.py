"""What is known of hardware by its name."""

from __future__ import annotations

import pytest
import torch

from megatron_ettin.platform import Platform


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
    ],
)
def test_the_peak_is_of_the_very_part(name: str, tflops: float) -> None:
    assert Platform(torch.device("cuda"), "nccl", name).peak_flops == tflops * 1e12


def test_a_cpu_is_in_no_table() -> None:
    assert Platform(torch.device("cpu"), "gloo", "AMD EPYC").peak_flops is None
