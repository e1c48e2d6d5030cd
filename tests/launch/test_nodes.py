"""A node that differs from the others is named, and the job is requeued on other nodes. The fault is mounted over the
node's files in its slurmd's mount namespace, so that other nodes do not see it. This needs root."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import megatron_ettin
from tests.launch.cluster import Cluster
from tests.launch.jobs import ETTIN, launch, launch_arguments, log_of, profile, train_arguments
from tests.train.runs import read

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a node's namespace want root"),
    pytest.mark.usefixtures("programs"),
]
NO_SPARE = "--sbatch-arg=--exclude=n3"  # the job runs on n1 and n2 only


def failed_log(cluster: Cluster, corpus: Path, run_dir: Path, *options: str) -> list[str]:
    """Run a job that must fail with exit status 2 and return its log."""
    arguments = launch_arguments(2, 1, "--time", "10", NO_SPARE, *options)
    job = launch(cluster, train_arguments(corpus, run_dir, 5), *arguments)
    assert cluster.wait_for_end(job) == "FAILED", log_of(run_dir)
    assert cluster.shown(job, "ExitCode").startswith("2:")
    return log_of(run_dir)


def test_node_with_unresolvable_host_name_is_named(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost n2\n")
    with slurm.mounted("n2", tmp_path / "hosts", Path("/etc/hosts"), "--bind"):
        log = failed_log(slurm, corpus, tmp_path / "run")
    (line,) = [line for line in log if line.startswith("supervisor:")]
    assert line.startswith("supervisor: node n2: host name n1 does not resolve")


@pytest.mark.full
def test_node_without_the_environment_is_named(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Mount an empty folder over the environment's folder on one node."""
    environment, empty = tmp_path / "bin", tmp_path / "empty"
    for folder in (environment, empty):
        folder.mkdir()
    (environment / "ettin").symlink_to(ETTIN)
    (tmp_path / "site.yaml").write_text(f"path: {environment}\npython: {sys.base_prefix}/bin/python3\n")
    with slurm.mounted("n2", empty, environment, "--bind"):
        log = failed_log(slurm, corpus, tmp_path / "run", "--profile", str(tmp_path / "site.yaml"))
    (line,) = [line for line in log if line.startswith("supervisor:")]
    assert (
        line
        == f"supervisor: node n2: {environment}/ettin does not exist or cannot be run; is it on a shared file system?"
    )


@pytest.mark.full
def test_node_with_full_disk_is_excluded_and_the_run_finishes(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Requeue the job without the full node, and finish on the spare one."""
    run_dir, scratch = tmp_path / "run", tmp_path / "scratch"
    for folder in (run_dir, scratch):
        folder.mkdir()
    site = profile(tmp_path / "site.yaml", f"check_paths: [{scratch}]\nmin_free_gib: 0.00001\n")
    arguments = launch_arguments(2, 1, "--time", "10", "--profile", str(site), "--sbatch-arg=--nodes=2")
    with slurm.mounted("n2", "tmpfs", scratch, "-t", "tmpfs", "-o", "size=64k"):
        job = launch(slurm, train_arguments(corpus, run_dir, 5), *arguments)
        assert slurm.wait_for_end(job) == "COMPLETED", log_of(run_dir)
    log = log_of(run_dir)
    assert any(f"supervisor: node n2: {scratch} cannot be written (No space left on device)" in line for line in log)
    assert any("requeued, to run without n2" in line for line in log)
    assert slurm.shown(job, "ExcNodeList") == "n2"
    assert slurm.shown(job, "Restarts") == "1"
    assert read(run_dir).column("step") == [1, 2, 3, 4, 5]


@pytest.mark.full
def test_node_with_other_code_is_named(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Edit one file in one node's checkout, so that the version is the same and the code differs."""
    package, copy = Path(megatron_ettin.__file__).parent, tmp_path / "package"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "train" / "step.py", "a") as file:
        file.write("# edited\n")
    with slurm.mounted("n2", copy, package, "--bind"):
        log = failed_log(slurm, corpus, tmp_path / "run")
    lines = [line for line in log if "the ranks differ in code of megatron_ettin" in line]
    assert lines, log
    assert all("rank 1 on n2: " in line or "rank 0 on n1: " in line for line in lines), log
    assert log[-2].startswith("--- rank "), log[-4:]
    assert log[-1] in lines[0], log[-4:]
