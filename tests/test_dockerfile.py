"""The images are made by the scripts that a bare machine is set up by, from pinned parts. There is no container engine here:
nothing is built, what can be read is checked."""

from __future__ import annotations

import configparser
import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def targets() -> dict[str, list[str]]:
    """Instructions of each target, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    found: dict[str, list[str]] = {}
    for line in joined:
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = []
        found[list(found)[-1]].append(line)
    return found


def pins(name: str) -> dict[str, Version]:
    """Versions of a constraints file."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): Version(version) for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    """Of setup.cfg, with these extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_each_target(target: str) -> None:
    lines = targets()[target]
    image = lines[0].split()[1]
    assert re.search(r":\d+\.\d+", image), f"{image}: no fixed tag"
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert len(users) == 1 and int(users[0]) > 0  # a number: a cluster may run it without looking the name up
    assert any(
        line.startswith("HEALTHCHECK ") and line.endswith('CMD ["ettin", "doctor", "--quick"]') for line in lines
    )
    labels = [line for line in lines if line.startswith("LABEL ")]
    for name in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels[0]


@pytest.mark.parametrize(("target", "script"), [("cpu", "tools/setup_venv.sh"), ("gpu", "tools/setup_gpu.sh")])
def test_the_scripts_install_and_nothing_else(target: str, script: str) -> None:
    runs = [line for line in targets()[target] if line.startswith("RUN ")]
    assert f"RUN bash {script}" in runs and (ROOT / script).is_file()
    assert not any("pip install" in line for line in runs)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert f"constraints-{target}.txt" in (ROOT / script).read_text()


def test_the_tests_are_those_of_ci() -> None:
    assert targets()["cpu"][-1] == 'CMD ["bash", "tests/run.sh"]'
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("name", "extras"), [("cpu", ("data", "deepspeed", "test")), ("gpu", ("gpu", "data", "deepspeed", "wandb"))]
)
def test_pins_are_within_the_ranges(name: str, extras: tuple[str, ...]) -> None:
    pinned = pins(f"constraints-{name}.txt")
    wanted = {requirement.name.lower(): requirement for requirement in requirements(*extras)}
    if name == "gpu":
        assert "torch" not in pinned  # the image's own, which the script holds to
        del wanted["torch"]
    for key, requirement in wanted.items():
        assert key in pinned, f"{key} is not pinned"
        assert pinned[key] in requirement.specifier, f"{requirement} does not allow {pinned[key]}"


def test_both_pin_the_same_versions() -> None:
    cpu, gpu = pins("constraints-cpu.txt"), pins("constraints-gpu.txt")
    assert {key for key in cpu.keys() & gpu.keys() if cpu[key] != gpu[key]} == set()
    assert len({version for key, version in gpu.items() if key.startswith("transformer-engine")}) == 1


def test_what_is_copied_is_what_is_tracked() -> None:
    """`.dockerignore` leaves out nothing that the scripts need, and the environment of this checkout."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in (
        "setup.cfg",
        "pyproject.toml",
        "constraints-cpu.txt",
        "tools/setup_venv.sh",
        "tests/run.sh",
        "README.md",
    ):
        assert not any(fnmatch.fnmatch(needed, pattern.removeprefix("**/")) for pattern in ignored)
    assert {".venv", ".git"} <= set(ignored)


def test_a_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    """With the torch of the tests, which is built for CPUs: one line, and nothing is installed."""
    import torch

    if torch.version.cuda:
        pytest.skip("the torch of these tests is built for CUDA")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "tools" / "setup_gpu.sh"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup_gpu: the torch of ") and "tools/setup_venv.sh" in line


def test_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
