"""The driver's version, and whether torch has kernels for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.platform import inventory


def test_driver_version_is_read_from_the_proc_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert inventory.driver(file) is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\n")
    assert inventory.driver(file) == "580.65.06"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert inventory.driver(file) == "535.104.05"


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_120"], (12, 1), True),
    ],
)
def test_has_kernels_depends_on_built_architectures(
    built_for: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert inventory.has_kernels(built_for, *capability) is runs
