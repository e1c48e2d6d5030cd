"""Run a real SLURM of a few nodes on this host (tools/slurm_sandbox.sh): submit to it, query it, break it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.launch.forked import NAMED

ROOT = Path(__file__).resolve().parents[2]
SANDBOX = ROOT / "tools" / "slurm_sandbox.sh"
POLL_SECONDS = 0.05
ASK_SECONDS = 0.2  # seconds between calls of SLURM's commands, since each call is a process


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    if shutil.which("slurmctld", path=os.environ.get("PATH", "") + ":/usr/sbin") is None:
        return "SLURM is not installed (as root, `bash tests/run.sh --install-system` installs it)"
    return None


def require_slurm() -> None:
    """Skip the test if SLURM is not installed; in CI fail it."""
    why = missing()
    if why is not None and os.environ.get("CI"):
        pytest.fail(why)
    if why is not None:
        pytest.skip(why)


def wait_until(condition: Callable[[], bool], seconds: float, what: str, poll_seconds: float = POLL_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(poll_seconds)


@dataclass(frozen=True)
class Process:
    """A process of this host, as /proc shows it.

    Attributes:
        pid: id of the process that does the work. For a client of tests/forkserver.py, it is the fork.
        started: id of the process that was started: the client, or the same as `pid`.
        parent: id of the parent of `started`.
    """

    pid: int
    started: int
    parent: int
    command: str
    environment: dict[str, str]


def processes() -> list[Process]:
    running, forks = [], {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, status = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # the process has ended meanwhile
        if name.startswith(NAMED):
            forks[int(name.removeprefix(NAMED))] = int(folder.name)
        variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        running.append(Process(int(folder.name), int(folder.name), int(status.split()[1]), command, variables))
    return [replace(process, pid=forks.get(process.pid, process.pid)) for process in running]


class Cluster:
    """A cluster whose files are in the folder `state`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = {"SLURM_CONF": str(state / "slurm.conf")}

    def up(self, nodes: int = 3, cpus: int = 16, gpus: int = 8) -> None:
        port = 18_000 + os.getpid() % 100 * 10  # each test session on this host has its own ports
        settings = {**os.environ, "GPUS": str(gpus)}
        command = ["bash", SANDBOX, "up", self.state, str(nodes), str(cpus), str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
        assert done.returncode == 0, done.stderr

    def down(self) -> None:
        subprocess.run(["bash", SANDBOX, "down", self.state], capture_output=True, timeout=120)

    def start_node(self, name: str) -> None:
        subprocess.run(["bash", SANDBOX, "node", self.state, name], check=True, timeout=60)

    def call(self, *command: str | Path, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command with this cluster in its environment."""
        variables = {**os.environ, **self.environment, **environment}
        return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, env=variables)

    def submit(self, *arguments: str | Path, **environment: str) -> str:
        """Submit with sbatch and return the job's id."""
        done = self.call("sbatch", "--parsable", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state_of(self, job: str) -> str:
        """Return PENDING, RUNNING, COMPLETED, ...; empty when SLURM has forgotten the job."""
        for word in self.call("scontrol", "show", "job", job).stdout.split():
            if word.startswith("JobState="):
                return word.partition("=")[2]
        return ""

    def shown(self, job: str, key: str) -> str:
        """Return a field of `scontrol show job`."""
        fields = self.call("scontrol", "show", "job", job).stdout.split()
        return next((word.partition("=")[2] for word in fields if word.startswith(key + "=")), "")

    def wait_for_end(self, job: str, seconds: float = 240) -> str:
        """Wait for the end of a job and return its final state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        waiting_for = f"end of job {job}, {self.state_of(job)}"
        wait_until(lambda: self.state_of(job) in ended, seconds, waiting_for, ASK_SECONDS)
        return self.state_of(job)

    def step_processes(self, job: str) -> list[Process]:
        """Return the processes of the job's steps, without SLURM's own."""
        mine = [p for p in processes() if p.environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]]
        mine = [p for p in mine if p.environment.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in p.environment]
        return [p for p in mine if not p.command.startswith("slurmstepd")]

    def ranks(self, job: str) -> dict[int, Process]:
        """Return the job's `ettin` ranks by number, without the processes that they started themselves."""
        mine = [p for p in self.step_processes(job) if "ettin " in p.command]
        pids = {p.started for p in mine}
        return {int(p.environment["SLURM_PROCID"]): p for p in mine if p.parent not in pids}

    def slurmd(self, node: str) -> int:
        """Return the process id of a node's slurmd."""
        lines = [line.split() for line in (self.state / "pids").read_text().splitlines()]
        return int([pid for pid, name in lines if name == f"slurmd-{node}"][-1])

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    @contextmanager
    def mounted(self, node: str, what: str | Path, target: Path, *options: str) -> Iterator[None]:
        """Mount something on one node while the body runs; other nodes do not see it. Needs root."""
        self.in_node(node, "mount", *options, what, target)
        try:
            yield
        finally:
            self.in_node(node, "umount", "--lazy", target)

    def in_node(self, node: str, *command: str | Path) -> None:
        """Run a command in the mount namespace of one node."""
        done = self.call("nsenter", "--target", str(self.slurmd(node)), "--mount", *command)
        assert done.returncode == 0, done.stderr


def lines_of(path: Path) -> Sequence[str]:
    return path.read_text().splitlines() if path.exists() else []
