"""Tiny runs as jobs on the sandbox cluster, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.launch import forked
from tests.launch.cluster import Cluster, lines_of
from tests.train.runs import TINY

PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
ETTIN = str(Path(sys.executable).parent / "ettin")
EVERY = 2
PACE_SECONDS = 0.1


def forked_path() -> str:
    """Return a PATH on which `ettin` is a fork of the test session's server."""
    return f"{forked.folder()}:{PATH}"


def train_arguments(corpus: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    """Return the arguments of `ettin train` for an encoder of the size 17m with the tests' tiny shape."""
    named = ["--size", "17m", "--objective", "mlm", "--phase", "pretrain", "--run-dir", str(run_dir)]
    saves = [f"run.steps={steps}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep=0", "resilience.hang_seconds=10"]
    return [*named, *TINY, f"data.mixture={corpus}", *saves, *more]


def launch_arguments(nodes: int, tasks: int, *more: str) -> list[str]:
    """Return the options of `ettin launch` for nodes without GPUs, with `tasks` ranks on each."""
    return ["--nodes", str(nodes), "--gpus-per-node", "0", "--tasks-per-node", str(tasks), *more]


def launch(
    cluster: Cluster, arguments: list[str], *options: str, pace: float = PACE_SECONDS, real: bool = False
) -> str:
    """Submit with `ettin launch --submit` and return the job's id.

    Args:
        cluster: the cluster to submit to.
        arguments: arguments of `ettin train`.
        options: options of `ettin launch`.
        pace: seconds that each rank sleeps in each step.
        real: whether ranks are ordinary processes instead of forks; they import for seconds and ignore `pace`.
    """
    if not real and "--profile" not in options:
        options = (*options, "--profile", str(profile()))
    variables = {"PATH": PATH, forked.PACE_VARIABLE: str(pace)}
    done = cluster.call(ETTIN, "launch", *options, "--submit", "--", "train", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("job ", 1)[1].split(";", 1)[0]


def profile(target: Path | None = None, text: str = "") -> Path:
    """Write a launch profile that uses the forked programs, and return its path.

    `text` adds keys. Without `target` the profile is written next to the programs."""
    path = target or forked.folder() / "site.yaml"
    path.write_text(f"path: {forked.folder()}\n{text}")
    return path


def all_output(run_dir: Path) -> str:
    """Return the output of the run's jobs as one text."""
    return "\n".join(log_of(run_dir))


def step_of(run_dir: Path) -> int:
    """Return the number of lines in metrics.jsonl, which is the last recorded step."""
    return len(lines_of(run_dir / "metrics.jsonl"))


def log_of(run_dir: Path) -> list[str]:
    """Return the lines that the run's jobs wrote, without the lines of steps."""
    logs = sorted((run_dir / "slurm").glob("*.out"))
    return [line for log in logs for line in lines_of(log) if not line.startswith("step ")]
