"""One node differs from the others: the line that names it, and the job that is requeued elsewhere. The fault is mounted
over the node's files in its slurmd's own mount namespace, so that the other nodes stay as they are (root only)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_ettin
from tests.launch.cluster import Cluster, wait_until
from tests.launch.jobs import launch, launch_words, log_of, train_words
from tests.train.runs import read

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a node's namespace want root")
NO_SPARE = "--sbatch-arg=--exclude=n3"  # n1 and n2 are all there is


@pytest.fixture
def bad_node(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster; n2's mounts are undone afterwards by starting its slurmd anew."""
    yield slurm
    pid = slurm.slurmd("n2")
    slurm.kill(pid)
    wait_until(
        lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(), 30, "end"
    )
    slurm.start_node("n2")
    wait_until(lambda: slurm.call("srun", "-w", "n2", "-t", "1", "true", timeout=30).returncode == 0, 90, "n2 back")


def failed_log(cluster: Cluster, corpus: Path, run_dir: Path, *options: str) -> list[str]:
    """Run a job that must fail with exit status 2 and return its log."""
    words = launch_words(2, 1, "--time", "10", NO_SPARE, *options)
    job = launch(cluster, train_words(corpus, run_dir, 5), *words)
    assert cluster.wait_for_end(job) == "FAILED", log_of(run_dir)
    assert cluster.shown(job, "ExitCode").startswith("2:")
    return log_of(run_dir)


def test_node_with_unresolvable_host_name_is_named(bad_node: Cluster, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost n2\n")
    bad_node.in_node("n2", "mount", "--bind", tmp_path / "hosts", "/etc/hosts")
    (line,) = [line for line in failed_log(bad_node, corpus, tmp_path / "run") if line.startswith("supervisor:")]
    assert line.startswith("supervisor: node n2: host name n1 does not resolve")


def test_node_without_the_environment_is_named(bad_node: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Mount an empty folder over the environment's folder on one node."""
    environment, empty = tmp_path / "bin", tmp_path / "empty"
    shutil.copytree(Path(sys.executable).parent, environment, symlinks=True)
    empty.mkdir()
    (tmp_path / "site.yaml").write_text(f"path: {environment}\npython: {sys.base_prefix}/bin/python3\n")
    bad_node.in_node("n2", "mount", "--bind", empty, environment)
    log = failed_log(bad_node, corpus, tmp_path / "run", "--profile", str(tmp_path / "site.yaml"))
    (line,) = [line for line in log if line.startswith("supervisor:")]
    assert (
        line
        == f"supervisor: node n2: {environment}/ettin is not there or cannot be run; is it on a shared file system?"
    )


def test_node_with_full_disk_is_excluded_and_the_run_finishes(bad_node: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Requeue the job without the full node, and finish on the spare one."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bad_node.in_node("n2", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", scratch)
    (tmp_path / "site.yaml").write_text(f"check_paths: [{scratch}]\nmin_free_gib: 0.00001\n")
    words = launch_words(2, 1, "--time", "10", "--profile", str(tmp_path / "site.yaml"), "--sbatch-arg=--nodes=2")
    job = launch(bad_node, train_words(corpus, run_dir, 5), *words)
    assert bad_node.wait_for_end(job) == "COMPLETED", log_of(run_dir)
    log = log_of(run_dir)
    assert any(f"supervisor: node n2: {scratch} cannot be written (No space left on device)" in line for line in log)
    assert any("requeued, to run without n2" in line for line in log)
    assert bad_node.shown(job, "ExcNodeList") == "n2"
    assert bad_node.shown(job, "Restarts") == "1"
    assert read(run_dir).column("step") == [1, 2, 3, 4, 5]


def test_node_with_other_code_is_named(bad_node: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Edit one file in one node's checkout, so that the version is the same and the code differs."""
    package, copy = Path(megatron_ettin.__file__).parent, tmp_path / "package"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "train" / "step.py", "a") as file:
        file.write("# edited\n")
    bad_node.in_node("n2", "mount", "--bind", copy, package)
    log = failed_log(bad_node, corpus, tmp_path / "run")
    told = [line for line in log if "the ranks differ in code of megatron_ettin" in line]
    assert told, log
    assert all("rank 1 on n2: " in line or "rank 0 on n1: " in line for line in told), log
    assert log[-2].startswith("--- rank "), log[-4:]
    assert log[-1] in told[0], log[-4:]
