"""Profiles of sites: what they put into scripts, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.launch.cluster import ROOT
from tests.launch.scripts import CALL, write_scripts

PROFILES = sorted((ROOT / "examples" / "slurm" / "sites").glob("*.yaml"))


def test_launch_profile_sbatch_options_reach_the_script(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "gpus_per_node: 1\ncpus_per_task: 1\nsbatch: {exclusive: true, contiguous: false, comment: a b, time: 1-0}\n"
    )
    (text,) = write_scripts(tmp_path, ["--nodes", "1", "--profile", str(tmp_path / "site.yaml")], CALL).values()
    for line in ("--exclusive", "--comment='a b'", "--time=1-0"):
        assert f"#SBATCH {line}\n" in text
    assert "contiguous" not in text


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_launch_example_profiles_give_valid_scripts(tmp_path: Path, profile: Path) -> None:
    (text,) = write_scripts(tmp_path, ["--nodes", "2", "--profile", str(profile)], CALL).values()
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "{" not in text.split("command=(")[1].replace("${command[@]}", "")
    container = {"pyxis": "--container-image=/shared", "apptainer": "apptainer exec --nv"}.get(profile.stem)
    assert container is None or container in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sbtach: {}\n", "no key 'sbtach' (did you mean 'sbatch'?)"),
        ("srun: --x\n", "srun must be list[str], is '--x'"),
        ("gpus_per_node: many\n", "gpus_per_node must be int | None, is 'many'"),
        ("gpus_per_node: -1\n", "gpus_per_node -1: must be at least 0"),
        ("container_prefix: ['{image}']\n", "only {container}, {folder}, {cwd} are known"),
        ("sbatch: {--partition: gpu}\n", "'--partition': write a long option without its dashes"),
        ("sbatch: {nodes: 4}\n", "'nodes' is set by `ettin launch`"),
        ("environment: {A B: 1}\n", "'A B' is not the name of a variable"),
        ("[1]\n", "holds no keys"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_launch_bad_profile_is_refused_in_one_line(
    tmp_path: Path, content: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.yaml").write_text(content)
    arguments = ["--nodes", "1", "--profile", str(tmp_path / "site.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main(["launch", *arguments[:4], "--", *CALL, *arguments[4:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert str(tmp_path / "site.yaml") in line
