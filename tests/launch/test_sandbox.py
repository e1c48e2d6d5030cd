"""`tools/slurm_sandbox.sh`: its message without SLURM, and the names of its nodes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import ROOT, blocks_of
from tests.launch.cluster import SANDBOX, Cluster, require_slurm
from tests.launch.jobs import PATH
from tests.train.runs import TINY, read


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


@pytest.mark.full
def test_sandbox_blocks_of_the_slurm_page_run_as_printed(corpus: Path, tmp_path: Path) -> None:
    """Run the page's blocks, with another folder and other ports, because other tests run a cluster at the same
    time."""
    require_slurm()
    page = (ROOT / "docs" / "slurm.md").read_text()
    first, last = [block.text for block in blocks_of(page, "docs/slurm.md") if "/tmp/cluster" in block.text]
    state, port = tmp_path / "state", 20_000 + os.getpid() % 100 * 10
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "tiny.yaml").write_text(site_file([*TINY, f"data.mixture={corpus}", "run.steps=3"]))
    wait = "until grep -q -e done -e mistake runs/sandbox/slurm/events.jsonl; do sleep 1; done\n"
    text = f"trap '{SANDBOX} down {state}' EXIT\n{first}{wait}{last}"
    text = text.replace("up /tmp/cluster 3 8", f"up /tmp/cluster 3 8 {port}").replace("/tmp/cluster", str(state))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path,
        env={**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    log = "".join(path.read_text() for path in (tmp_path / "runs").glob("**/*.out"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    assert read(tmp_path / "runs" / "sandbox").column("step") == [1, 2, 3], log
    (launched,) = (tmp_path / "runs" / "sandbox" / "history.jsonl").read_text().splitlines()
    assert json.loads(launched)["world"] == 2


def site_file(arguments: list[str]) -> str:
    """Return `group.key=value` overrides as the text of a YAML file."""
    groups: dict[str, dict[str, object]] = {}
    for word in arguments:
        key, _, value = word.partition("=")
        group, _, name = key.partition(".")
        # YAML 1.1 reads 3e-3 as text, unlike the command line
        groups.setdefault(group, {})[name] = float(value) if "e-" in value else yaml.safe_load(value)
    return yaml.safe_dump(groups)
