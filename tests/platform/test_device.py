"""What is known of hardware by its name."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_ettin.platform import Platform, detect


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


def test_communication_begins_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before CUDA starts, unless who starts the run has set it."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    detect("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    detect("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_a_cpu_is_in_no_table() -> None:
    assert Platform(torch.device("cpu"), "gloo", "AMD EPYC").peak_flops is None
