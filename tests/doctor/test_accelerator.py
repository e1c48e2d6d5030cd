"""GPUs and their packages: each state is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.doctor import accelerator
from megatron_ettin.platform import inventory


def test_apex_from_pypi_is_not_taken_for_nvidia_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert inventory.apex_package() is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert inventory.apex_package() == "other"
    finding = accelerator._apex(has_gpu=True)
    assert finding.state == "warning"
    assert "pip uninstall apex" in finding.todo
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").touch()
    assert inventory.apex_package() == "nvidia"
    assert accelerator._apex(has_gpu=True).state == "note"
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert accelerator._apex(has_gpu=True).state == "ok"


def test_apex_with_transformer_engine_is_used_in_fp32_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Transformer Engine, only fp32 runs use Apex (platform/layers.py), so its absence is no problem."""
    metadata = tmp_path / "transformer_engine-2.12.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.12.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    absent = accelerator._apex(has_gpu=True)
    assert (absent.state, absent.text) == ("ok", "absent; with Transformer Engine only runs in fp32 use it")
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert accelerator._apex(has_gpu=True).text == "NVIDIA's; with Transformer Engine only runs in fp32 use it"


def test_missing_gpu_packages_matter_only_with_a_gpu() -> None:
    here = [accelerator._transformer_engine(False, True), accelerator._apex(False), accelerator._flash_attention(False)]
    assert {one.state for one in here} == {"ok"}
    there = [accelerator._transformer_engine(True, True), accelerator._apex(True), accelerator._flash_attention(True)]
    assert [one.state for one in there] == ["warning", "note", "note"]
    assert all("absent: " in one.text for one in there)


def test_transformer_engine_broken_or_old_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "version_of", lambda name: "2.13.0")
    monkeypatch.setattr(inventory, "transformer_engine_error", lambda: "ImportError: undefined symbol: cublasLt")
    finding = accelerator._transformer_engine(True, False)
    assert finding.state == "warning"
    assert "undefined symbol" in finding.text
    assert "no FP8" in finding.text
    monkeypatch.setattr(inventory, "transformer_engine_error", lambda: None)
    monkeypatch.setattr(accelerator, "version_of", lambda name: "2.11.0")
    assert "older than 2.12.0" in accelerator._transformer_engine(True, False).text


def test_gpus_missing_or_too_old_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    # an earlier CPU run in this process has emptied it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert accelerator._gpus([], 0)[0].state == "note"
    assert accelerator._gpus([], 8)[0].state == "problem"
    part = inventory.Gpu("NVIDIA H100", 79.6, "9.0", True)
    assert [one.state for one in accelerator._gpus([part] * 8, 8)] == ["ok"]
    assert [one.state for one in accelerator._gpus([part] * 7, 8)] == ["ok", "problem"]
    old = inventory.Gpu("NVIDIA V100", 32, "7.0", False)
    assert accelerator._gpus([old], None)[0].state == "problem"
    monkeypatch.setattr(inventory, "driver", lambda: "580.65.06")
    assert accelerator._gpus([], None)[0].state == "problem"  # there is a driver, but torch sees no GPU
