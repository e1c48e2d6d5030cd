"""Device properties looked up by name, and environment variables set on detection."""

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
def test_platform_peak_flops_matches_device_name(name: str, tflops: float) -> None:
    assert Platform(torch.device("cuda"), "nccl", name).peak_flops == tflops * 1e12


def test_detect_sets_cuda_device_max_connections_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is set before CUDA starts; a value that the user has set is kept."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    detect("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    detect("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_platform_peak_flops_of_cpu_is_none() -> None:
    assert Platform(torch.device("cpu"), "gloo", "AMD EPYC").peak_flops is None
