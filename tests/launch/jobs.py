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
    """Return the words of a train call: encoder 17m by name, tiny by shape."""
    named = ["--size", "17m", "--objective", "mlm", "--phase", "pretrain", "--run-dir", str(run_dir)]
    saves = [f"run.steps={steps}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep=0", "resilience.hang_seconds=10"]
    return [*named, *TINY, f"data.mixture={corpus}", *saves, *more]


def launch_arguments(nodes: int, tasks: int, *more: str) -> list[str]:
    """Return the words of a launch call up to the `--`, without GPUs."""
    return ["--nodes", str(nodes), "--gpus-per-node", "0", "--tasks-per-node", str(tasks), *more]


def launch(
    cluster: Cluster, arguments: list[str], *options: str, pace: float = PACE_SECONDS, real: bool = False
) -> str:
    """Submit with `ettin launch --submit` and return the id of the one job.

    Args:
        cluster: where to.
        words: of the call of `ettin train`.
        options: of `ettin launch`.
        pace: seconds that each step takes longer.
        real: whether ranks are processes of their own from the start, which import for seconds and have no pace.
    """
    if not real and "--profile" not in options:
        options = (*options, "--profile", str(profile()))
    variables = {"PATH": PATH, forked.PACE_VARIABLE: str(pace)}
    done = cluster.call(ETTIN, "launch", *options, "--submit", "--", "train", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("job ", 1)[1].split(";", 1)[0]


def profile(target: Path | None = None, text: str = "") -> Path:
    """Write a profile whose `ettin` is forked, with further keys; next to the forked programs by default."""
    path = target or forked.folder() / "site.yaml"
    path.write_text(f"path: {forked.folder()}\n{text}")
    return path


def all_output(run_dir: Path) -> str:
    """Return the output of the run's jobs as one text."""
    return "\n".join(log_of(run_dir))


def step_of(run_dir: Path) -> int:
    """Return the last step in metrics.jsonl."""
    return len(lines_of(run_dir / "metrics.jsonl"))


def log_of(run_dir: Path) -> list[str]:
    """Return the lines that the run's jobs wrote, without those of steps."""
    logs = sorted((run_dir / "slurm").glob("*.out"))
    return [line for log in logs for line in lines_of(log) if not line.startswith("step ")]
