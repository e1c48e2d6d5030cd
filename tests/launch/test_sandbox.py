"""`tools/slurm_sandbox.sh`: what it says without SLURM, and the names of its nodes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.cluster import SANDBOX, Cluster


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting over /usr/sbin wants root")
def test_sandbox_up_without_slurm_names_packages_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hidden = f"mount --bind {tmp_path}/empty /usr/sbin && bash {SANDBOX} up {tmp_path}/state"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hidden]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("slurm_sandbox: not installed: slurmctld")
    assert "apt-get install slurmctld slurmd" in line
    assert not (tmp_path / "state").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="names of nodes want a mount namespace of their own")
def test_sandbox_node_names_resolve_inside_jobs(slurm: Cluster) -> None:
    done = slurm.call("srun", "--nodes=3", "sh", "-c", "hostname; getent hosts n1 n2 n3 | wc -l")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["3", "3", "3", "n1", "n2", "n3"]
