"""`ettin release --push` to a hub on this machine: the pushed content, and resuming after an interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prepare.small_tasks import wait_for
from tests.release.conftest import NAMES, SAME
from tests.release.hub import Hub, serving
from tests.release.running import release_program

pytestmark = pytest.mark.ranks
LOAD = """
import sys, torch, transformers
found = transformers.AutoModelForMaskedLM.from_pretrained("lab/tiny", revision=sys.argv[1])
same = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[2])
pairs = zip(found.state_dict().values(), same.state_dict().values(), strict=True)
assert all(torch.equal(a, b) for a, b in pairs)
tokenizer = transformers.AutoTokenizer.from_pretrained("lab/tiny", revision=sys.argv[1])
print(len(tokenizer))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        yield running


@pytest.fixture
def out(released: Path, tmp_path: Path) -> Path:
    """Return a copy of the release without one revision."""
    shutil.copytree(released, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "step10")
    return tmp_path / "out"


def environment(hub: Hub, home: Path) -> dict[str, str]:
    mine = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return {**os.environ, **mine, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}


def start(hub: Hub, trained: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    line = [str(trained / "mlm/decay"), "--out", str(out), "--workers", "1", *SAME, "--push", "lab/tiny", "--json"]
    return subprocess.Popen(
        release_program(*line, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub, out.parent / "home"),
    )


def finished(running: subprocess.Popen[str], status: int = 0) -> str:
    out, err = running.communicate(timeout=200)
    assert running.returncode == status, err
    return out if status == 0 else err.strip().splitlines()[-1]


def check_hub(hub: Hub, out: Path) -> None:
    """Assert that every branch holds its folder's files and nothing else, and that main also has the data order."""
    assert sorted(hub.branches) == sorted([*NAMES, "main"])
    for name, tree in hub.branches.items():
        wanted = {path.name: path.read_bytes() for path in (out / name).iterdir()}
        if name == "main":
            wanted |= {f"data_order/{path.name}": path.read_bytes() for path in (out / "data_order").iterdir()}
        assert {path: content for path, content in tree.items() if path != ".gitattributes"} == wanted, name


def test_push_killed_midway_resumes_without_repeated_commits(hub, trained, out):
    hub.held_after = 4
    running = start(hub, trained, out, "--private")
    wait_for(lambda: len(hub.commits) == 4 or running.poll() is not None)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    hub.held_after = None
    hub.let_go.set()
    assert hub.commits == NAMES[:4]
    assert hub.visibility == "private"
    reported = json.loads(finished(start(hub, trained, out)))["push"]
    assert reported["kept"] == NAMES[:4]
    assert reported["uploaded"] == [*NAMES[4:], "main"]
    assert hub.commits == [*NAMES, "main"]  # one commit for each revision
    check_hub(hub, out)
    uploads = hub.uploads
    reported = json.loads(finished(start(hub, trained, out)))["push"]
    assert reported["uploaded"] == []
    assert hub.uploads == uploads
    assert len(hub.commits) == len(NAMES) + 1
    # extra files on a branch are removed, and changed files are sent again
    hub.branches["step5"] |= {"stray.bin": b"1", "config.json": b"{}"}
    reported = json.loads(finished(start(hub, trained, out)))["push"]
    assert reported["uploaded"] == ["step5"]
    assert hub.uploads == uploads
    check_hub(hub, out)


@pytest.mark.full
def test_push_revision_is_loaded_by_repository_and_branch(hub, trained, out):
    finished(start(hub, trained, out))
    load = subprocess.run(
        [sys.executable, "-c", LOAD, "ext1", str(out / "ext1")],
        capture_output=True,
        text=True,
        env=environment(hub, out.parent / "home"),
        timeout=200,
    )
    assert load.returncode == 0, load.stderr
    assert load.stdout.strip() == "320", load.stderr


def test_push_refused_by_hub_names_http_status(hub, trained, out):
    hub.refuse = {r"/commit/step10": 403}
    line = finished(start(hub, trained, out), status=2)
    assert line.startswith("ettin release: --push lab/tiny: 403")
    assert "run it again to go on" in line
    assert "2 of 7 revisions are there" in line
    assert "main" not in hub.commits
    hub.refuse = {"/api/repos/create": 401}
    line = finished(start(hub, trained, out), status=2)
    assert line.startswith("ettin release: --push lab/tiny: ")
    assert "401" in line
