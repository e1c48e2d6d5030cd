"""Compare the versions of Python and of packages with those that setup.cfg allows and those that the tests ran with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from megatron_ettin.base.versions import code_version, version_of
from megatron_ettin.doctor.findings import Finding, note, ok, problem, warning

PACKAGE = "megatron-ettin"
OLDEST_PYTHON = (3, 10)
TESTED_PYTHON = ("3.11",)

# from constraints-cpu.txt (tests/doctor compares them), without development tools
TESTED = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "omegaconf": "2.4.0",
    "packaging": "26.3",
    "psutil": "7.2.2",
    "pyarrow": "26.0.1",
    "rich": "15.0.0",
    "fsspec": "2026.9.0",
    "tensorboard": "2.21.0",
    "matplotlib": "3.11.2",
    "zstandard": "0.25.0",
    "datasets": "5.2.0",
    "datatrove": "0.10.1",
    "huggingface_hub": "2.4.0",
    "xxhash": "4.1.0",
    "deepspeed": "0.19.8",
    "wandb": "0.31.0",
}
# from constraints-gpu.txt: chosen by the requirements that packages declare, not run yet (docs/gpu-validation.md)
PINNED = {"transformer-engine": "2.12.0"}
# extras that no run needs
DEVELOPMENT_EXTRAS = ("test", "docs")
# packages whose internals are used: another version does not work, or works wrongly
STRICT = ("torch", "megatron-core", "transformer-engine", "deepspeed")


def version_findings() -> list[Finding]:
    """Return findings on Python, on each package that is missing or out of range, and one on all other packages."""
    return [*_own(), *_packages(_requirements())]


def _own() -> list[Finding]:
    python = platform.python_version()
    own = ok("megatron_ettin", code_version(), version=code_version())
    if sys.version_info < OLDEST_PYTHON:
        return [
            own,
            problem("python", f"{python}: 3.10 is the oldest supported", "create the environment with a newer one"),
        ]
    if not python.startswith(tuple(f"{tested}." for tested in TESTED_PYTHON)):
        return [own, note("python", f"{python}, untested; tested: {', '.join(TESTED_PYTHON)}", version=python)]
    return [own, ok("python", python, version=python)]


def _requirements() -> dict[str, tuple[Requirement, bool]]:
    """Return name -> (requirement, whether only an extra has it); {} if this package is not installed."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    requirements: dict[str, tuple[Requirement, bool]] = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        optional = marker is not None and not marker.evaluate({"extra": ""})
        if optional and marker is not None and any(marker.evaluate({"extra": extra}) for extra in DEVELOPMENT_EXTRAS):
            continue
        requirements.setdefault(requirement.name, (requirement, optional))
    return requirements


def _packages(wanted: dict[str, tuple[Requirement, bool]]) -> list[Finding]:
    if not wanted:
        todo = "pip install -e . in the checkout, or megatron-ettin itself"
        return [warning("packages", "megatron-ettin is not installed here, so its requirements are unknown", todo)]
    bad, as_tested, others, absent = [], 0, [], []
    for name, (requirement, optional) in wanted.items():
        version, tested = version_of(name), TESTED.get(name) or PINNED.get(name)
        if version is None:
            if optional:
                absent.append(name)
            else:
                bad.append(problem(name, f"missing; {PACKAGE} needs {requirement.specifier}", _install(requirement)))
        elif not _allowed(version, requirement):
            finding = problem if name in STRICT else warning
            text = f"{version} is outside of {requirement.specifier}" + (f"; tested: {tested}" if tested else "")
            bad.append(finding(name, text, _install(requirement), version=version, tested=tested))
        elif tested is not None and not _same(version, tested):
            others.append(f"{name} {version} (tested: {tested})")
        else:
            as_tested += 1
    figures = {
        name: {
            "version": version_of(name),
            "tested": TESTED.get(name),
            "pinned": PINNED.get(name),
            "allowed": str(requirement.specifier),
        }
        for name, (requirement, _) in wanted.items()
    }
    text = f"{as_tested} as tested" + (f"; within their ranges: {', '.join(others)}" if others else "")
    packages = [(note if others else ok)("packages", text, **figures)]
    if absent:
        packages.append(note("optional packages", f"not installed: {', '.join(sorted(absent))}"))
    return [*bad, *packages]


def _install(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"


def _allowed(version: str, requirement: Requirement) -> bool:
    """Return whether a version is in range; a build such as NVIDIA's 2.10.0a0+b4e4 counts as 2.10.0."""
    try:
        return Version(version).base_version in requirement.specifier or version in requirement.specifier
    except InvalidVersion:
        return False


def _same(version: str, tested: str) -> bool:
    """Return whether two versions are the same but for the build: `2.13.0+cpu` is 2.13.0."""
    return Version(version).public == Version(tested).public
