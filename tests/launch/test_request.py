"""Profiles of clusters, sbatch's time limits, and the margin before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.launch.request import parse_time_limit, resolve_margin
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


@pytest.mark.parametrize(
    ("time", "given", "margin"),
    [
        (None, None, 300),
        ("24:00:00", None, 300),
        ("UNLIMITED", None, 300),
        ("10", None, 150),
        ("1", None, 15),
        ("1-0", 7200, 7200),
        ("2:30", 149, 149),
        ("1-01:30", 91_799, 91_799),
    ],
)
def test_resolve_margin_of_time_limit_is_a_fraction_unless_given(
    time: str | None, given: int | None, margin: int
) -> None:
    assert resolve_margin(given, time) == margin


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("1:30", 90), ("1:00:30", 3630), ("2-3", 183_600), ("1-00:01:01", 86_461)]
)
def test_parse_time_limit_matches_sbatch_and_limits_the_margin(time: str, seconds: int) -> None:
    assert parse_time_limit(time) == seconds
    with pytest.raises(UserError, match=f"--margin-seconds {seconds}: must be less than --time {time}"):
        resolve_margin(seconds, time)
