"""The images use the set-up scripts of a bare machine, and pinned versions. Without a container engine nothing is
built; the tests read the files."""

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
    """Return the instructions of each target, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    stages: dict[str, list[str]] = {}
    for line in joined:
        if line.startswith("FROM "):
            stages[line.split(" AS ")[1]] = []
        stages[list(stages)[-1]].append(line)
    return stages


def pins(name: str) -> dict[str, Version]:
    """Return the versions in a constraints file."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): Version(version) for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    """Return the requirements of setup.cfg with these extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_dockerfile_target_has_fixed_tag_user_healthcheck_and_labels(target: str) -> None:
    lines = targets()[target]
    image = lines[0].split()[1]
    assert re.search(r":\d+\.\d+", image), f"{image}: no fixed tag"
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert len(users) == 1
    assert int(users[0]) > 0  # a numeric user id, because a cluster may not know the name
    assert any(
        line.startswith("HEALTHCHECK ") and line.endswith('CMD ["ettin", "doctor", "--quick"]') for line in lines
    )
    labels = [line for line in lines if line.startswith("LABEL ")]
    for name in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels[0]


@pytest.mark.parametrize(("target", "script"), [("cpu", "tools/setup_venv.sh"), ("gpu", "tools/setup_gpu.sh")])
def test_dockerfile_target_installs_by_setup_script_alone(target: str, script: str) -> None:
    runs = [line for line in targets()[target] if line.startswith("RUN ")]
    assert f"RUN bash {script}" in runs
    assert (ROOT / script).is_file()
    assert not any("pip install" in line for line in runs)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert f"constraints-{target}.txt" in (ROOT / script).read_text()


def test_dockerfile_cpu_command_is_test_script_of_ci() -> None:
    assert targets()["cpu"][-1] == 'CMD ["bash", "tests/run.sh"]'
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("name", "extras"), [("cpu", ("data", "deepspeed", "test")), ("gpu", ("gpu", "data", "deepspeed", "wandb"))]
)
def test_constraints_pins_satisfy_setup_cfg_ranges(name: str, extras: tuple[str, ...]) -> None:
    pinned = pins(f"constraints-{name}.txt")
    wanted = {requirement.name.lower(): requirement for requirement in requirements(*extras)}
    if name == "gpu":
        assert "torch" not in pinned  # the image has its own torch, which the script keeps
        del wanted["torch"]
    for key, requirement in wanted.items():
        assert key in pinned, f"{key} is not pinned"
        assert pinned[key] in requirement.specifier, f"{requirement} does not allow {pinned[key]}"


def test_constraints_cpu_and_gpu_pin_same_versions() -> None:
    cpu, gpu = pins("constraints-cpu.txt"), pins("constraints-gpu.txt")
    assert {key for key in cpu.keys() & gpu.keys() if cpu[key] != gpu[key]} == set()
    assert len({version for key, version in gpu.items() if key.startswith("transformer-engine")}) == 1


def test_dockerignore_keeps_needed_files_and_drops_venv_and_git() -> None:
    """`.dockerignore` excludes no file that the scripts need, and excludes .venv and .git."""
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


@pytest.mark.full
def test_setup_gpu_with_cpu_torch_is_refused_in_one_line(tmp_path: Path) -> None:
    """The torch of the tests is built for CPUs, so the script refuses and installs nothing."""
    import torch

    if torch.version.cuda:
        pytest.skip("the torch of these tests is built for CUDA")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "tools" / "setup_gpu.sh"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup_gpu: the torch of ")
    assert "tools/setup_venv.sh" in line


def test_dockerfile_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
