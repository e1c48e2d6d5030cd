"""Jobs of `ettin launch` on a real SLURM under faults: they end with the weights of an uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.cluster import ASK_SECONDS, Cluster, Process, wait_until
from tests.launch.jobs import ETTIN, EVERY, PATH, all_output, launch, launch_arguments, log_of, step_of, train_arguments
from tests.train.runs import Trained, read

pytestmark = pytest.mark.usefixtures("programs")
STEPS = 24
NO_SAVES = "checkpoint.every_steps=1000"
TWO_NODES = launch_arguments(2, 1, "--grace-seconds", "5", "--time", "20")
# the grace period is long enough for SLURM to notice a lost node first: if supervisor and SLURM requeue a job at the
# same time, SLURM 22.05 may end it
TWO_BY_TWO = launch_arguments(2, 2, "--grace-seconds", "15", "--time", "20")


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train without interruption on two nodes with one rank each."""
    return run_uninterrupted(slurm, corpus, tmp_path_factory.mktemp("jobs") / "two", TWO_NODES)


@pytest.fixture(scope="module")
def uninterrupted_of_four(slurm: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train without interruption on two nodes with two ranks each."""
    return run_uninterrupted(slurm, corpus, tmp_path_factory.mktemp("jobs") / "four", TWO_BY_TWO)


def run_uninterrupted(cluster: Cluster, corpus: Path, run_dir: Path, options: list[str]) -> Trained:
    job = launch(cluster, train_arguments(corpus, run_dir, STEPS), *options, pace=0)
    assert cluster.wait_for_end(job) == "COMPLETED", "\n".join(log_of(run_dir)[-30:])
    return read(run_dir)


def assert_same(run_dir: Path, uninterrupted: Trained) -> None:
    """Assert that steps, losses and weights are the same, bit for bit."""
    interrupted = read(run_dir)
    assert interrupted.column("step") == uninterrupted.column("step")
    assert interrupted.column("loss") == uninterrupted.column("loss")
    ours, theirs = interrupted.weights(), uninterrupted.weights()
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def events_of(run_dir: Path) -> list[str]:
    lines = (run_dir / "slurm" / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def past(run_dir: Path, steps: int) -> None:
    wait_until(lambda: step_of(run_dir) > steps, 120, f"step {steps}")


def doing(run_dir: Path) -> str | None:
    """Return the phase in the heartbeat of the first attempt."""
    beats = sorted((run_dir / "slurm" / "attempts").glob("*/heartbeat.json"))
    return json.loads(beats[0].read_text())["doing"] if beats else None


def status_of(cluster: Cluster, what: str | Path) -> dict:
    done = cluster.call(ETTIN, "status", what, "--json", PATH=PATH)
    assert done.returncode == 0, done.stderr
    (state,) = json.loads(done.stdout)
    return state


@contextlib.contextmanager
def held(stopped: Iterable[Process]) -> Iterator[None]:
    """Stop the processes by SIGSTOP while the body runs."""
    stopped = list(stopped)
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    yield
    for process in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)


@pytest.mark.full
def test_job_at_time_limit_requeues_and_matches_uninterrupted_run(
    slurm: Cluster, corpus: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    """SLURM's signal before the limit of one minute makes the run save and requeue itself until it is done.

    SLURM checks limits every 30 s. So short a run would be over by then, so its ranks are stopped meanwhile."""
    run_dir = tmp_path / "run"
    arguments = launch_arguments(2, 1, "--time", "1", "--margin-seconds", "10")
    job = launch(slurm, train_arguments(corpus, run_dir, STEPS, "resilience.hang_seconds=600"), *arguments)
    waiting = status_of(slurm, job)
    assert waiting["state"] in ("PENDING", "RUNNING", "CONFIGURING")
    assert waiting["job"] == job
    past(run_dir, 2)
    with held(slurm.ranks(job).values()):
        wait_until(lambda: status_of(slurm, run_dir)["state"] == "RUNNING", 60, "a job that runs", ASK_SECONDS)
        running = status_of(slurm, run_dir)
        assert running["total_steps"] == STEPS
        assert running["seconds_left"] > 0
        wait_until(lambda: "supervisor: SIGUSR1: asking the run to save" in all_output(run_dir), 90, "SLURM's warning")
    assert slurm.wait_for_end(job) == "COMPLETED", all_output(run_dir)
    assert_same(run_dir, uninterrupted)
    ended = status_of(slurm, run_dir)
    assert ended["last_event"] == "done"
    assert ended["launches"] >= 2
    assert ended["failures"] == 0
    assert ended["checkpoint_step"] == STEPS
    assert ended["fraction"] == 1.0


@pytest.mark.full
def test_job_under_signal_storm_requeues_once_and_matches_uninterrupted_run(
    slurm: Cluster, corpus: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    """Signal every rank while it finishes its step, saves and ends; the checkpoint must be complete."""
    run_dir = tmp_path / "run"
    job = launch(slurm, train_arguments(corpus, run_dir, STEPS), *TWO_NODES)
    past(run_dir, EVERY + 3)
    slurm.call("scancel", "--signal=USR1", job)
    # the signals do not go through SLURM, which may deliver one seconds later, to the job that was requeued meanwhile
    while "requeued" not in events_of(run_dir):
        for process in slurm.step_processes(job):
            for number in (signal.SIGUSR1, signal.SIGTERM):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        time.sleep(0.01)
    assert slurm.wait_for_end(job) == "COMPLETED", "\n".join(log_of(run_dir)[-30:])
    assert_same(run_dir, uninterrupted)
    assert "failed" not in events_of(run_dir)
    assert slurm.shown(job, "Restarts") == "1"


def last_rank(cluster: Cluster, job: str) -> Process:
    ranks = cluster.ranks(job)
    return ranks[max(ranks)]


def kill_rank(cluster: Cluster, job: str) -> None:
    cluster.kill(last_rank(cluster, job).pid)


def kill_slurmstepd(cluster: Cluster, job: str) -> None:
    """Kill a slurmstepd; SLURM never notices that."""
    cluster.kill(last_rank(cluster, job).parent)


def kill_node(cluster: Cluster, job: str) -> None:
    """Kill a node's slurmd, slurmstepd and ranks, as when a host is lost, and start the slurmd again later."""
    node = last_rank(cluster, job).environment["SLURMD_NODENAME"]
    ranks = [rank for rank in cluster.ranks(job).values() if rank.environment["SLURMD_NODENAME"] == node]
    for pid in (cluster.slurmd(node), ranks[0].parent, *(rank.pid for rank in ranks)):
        cluster.kill(pid)
    wait_until(lambda: int(cluster.shown(job, "Restarts")) > 1, 90, "SLURM to requeue the job", ASK_SECONDS)
    cluster.start_node(node)


def node_down(cluster: Cluster, job: str) -> None:
    node = last_rank(cluster, job).environment["SLURMD_NODENAME"]
    cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def test_job_with_killed_rank_restarts_and_matches_uninterrupted_run(
    slurm: Cluster, corpus: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    run_dir = tmp_path / "run"
    job = launch(slurm, train_arguments(corpus, run_dir, STEPS), *TWO_NODES)
    past(run_dir, EVERY + 3)
    kill_rank(slurm, job)
    assert slurm.wait_for_end(job) == "COMPLETED", "\n".join(log_of(run_dir)[-30:])
    assert_same(run_dir, uninterrupted)
    assert any("--- rank 1 on n2 was killed (srun: Killed)" in line for line in log_of(run_dir)) or os.geteuid() != 0
    assert events_of(run_dir) == ["submitted", "started", "failed", "done"]


@pytest.mark.full
def test_job_of_real_processes_with_killed_rank_restarts(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Start the ranks as users do: each imports for seconds, and the rendezvous ends after the last import."""
    run_dir = tmp_path / "run"
    job = launch(slurm, train_arguments(corpus, run_dir, 150, NO_SAVES), *TWO_NODES, real=True)
    past(run_dir, EVERY + 3)
    slurm.kill(slurm.ranks(job)[1].pid)
    assert slurm.wait_for_end(job) == "COMPLETED", "\n".join(log_of(run_dir)[-30:])
    assert read(run_dir).column("step") == list(range(1, 151))
    assert events_of(run_dir) == ["submitted", "started", "failed", "done"]


@pytest.mark.full
def test_job_with_killed_ranks_and_nodes_matches_uninterrupted_run(
    slurm: Cluster, corpus: Path, tmp_path: Path, uninterrupted_of_four: Trained
) -> None:
    """During one run, kill a rank, a slurmstepd and a node's slurmd with its processes, then set a node down."""
    run_dir = tmp_path / "run"
    job = launch(slurm, train_arguments(corpus, run_dir, STEPS), *TWO_BY_TWO, pace=0.25)
    for number, act in enumerate((kill_rank, kill_slurmstepd, kill_node, node_down)):
        past(run_dir, (number + 1) * 2 * EVERY + 3)
        act(slurm, job)
        wait_until(lambda: len(slurm.ranks(job)) < 4, 60, f"effect of {act.__name__}")
        wait_until(lambda: len(slurm.ranks(job)) == 4, 120, f"ranks after {act.__name__}", ASK_SECONDS)
    assert slurm.wait_for_end(job) == "COMPLETED", "\n".join(log_of(run_dir)[-30:])
    assert_same(run_dir, uninterrupted_of_four)
    log, happened = log_of(run_dir), events_of(run_dir)
    assert "--- rank 3 on n2 was killed (srun: Killed)" in "\n".join(log) or os.geteuid() != 0
    assert any("starting again (1 of 3 times" in line for line in log)
    assert any("a step of the job cannot be ended; requeued" in line for line in log)
    assert int(slurm.shown(job, "Restarts")) == 3
    assert happened[-1] == "done"


@pytest.mark.full
def test_job_with_stopped_rank_reports_hang_and_recovers(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Stop one rank of a job, while a second job on the same node must not be interrupted.

    Nothing is saved before the end, because the phase after a save may take longer than a step."""
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = launch_arguments(1, 2, "--grace-seconds", "5", "--time", "10", "--sbatch-arg=--nodelist=n1")
    # the second job is slower, so that it still runs when the first one has been restarted
    run_dirs = {first: 0.2, second: 0.5}
    jobs = [
        launch(slurm, train_arguments(corpus, run, 30, NO_SAVES), *arguments, pace=pace)
        for run, pace in run_dirs.items()
    ]
    wait_until(lambda: doing(first) == "step", 120, "a heartbeat of steps")
    os.kill(slurm.ranks(jobs[0])[1].pid, signal.SIGSTOP)
    assert [slurm.wait_for_end(job) for job in jobs] == ["COMPLETED", "COMPLETED"], log_of(first)[-30:]
    assert any("supervisor: stalled for" in line and "rank 1 on n1" in line for line in log_of(first))
    assert read(first).column("loss") == read(second).column("loss")


@pytest.mark.full
def test_job_with_repeatedly_failing_node_is_requeued_without_it(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Fail twice in a row without a new checkpoint, with one restart allowed; the job continues without that node."""
    run_dir = tmp_path / "run"
    arguments = launch_arguments(2, 1, "--restarts", "1", "--grace-seconds", "5", "--time", "10")
    job = launch(slurm, train_arguments(corpus, run_dir, 20, NO_SAVES), *arguments)
    for attempt in range(2):
        past(run_dir, 2)
        rank = slurm.ranks(job)[1]
        assert rank.environment["SLURMD_NODENAME"] == "n2"
        slurm.kill(rank.pid)
        wait_until(lambda: events_of(run_dir).count("failed") > attempt, 60, "the supervisor to see it")  # noqa: B023
        (run_dir / "metrics.jsonl").unlink()  # `past` counts the next attempt's steps from zero
    assert slurm.wait_for_end(job) == "COMPLETED", log_of(run_dir)[-30:]
    assert slurm.shown(job, "ExcNodeList") == "n2"
    assert any("n2 failed 2 times; requeued, to run without n2" in line for line in log_of(run_dir))


@pytest.mark.full
def test_job_with_damaged_checkpoint_fails_with_the_error_last_in_the_log(
    slurm: Cluster, corpus: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    """Resume from a damaged checkpoint, which no restart can mend."""
    run_dir = tmp_path / "run"
    saved = f"step_{2 * EVERY:09}"
    others = sorted(path.name for path in (uninterrupted.directory / "checkpoints").iterdir() if path.name != saved)
    shutil.copytree(uninterrupted.directory, run_dir, ignore=shutil.ignore_patterns("slurm", *others))
    (part,) = list((run_dir / "checkpoints" / saved).glob("__0_0.distcp"))
    part.write_bytes(part.read_bytes()[:-7])
    arguments = launch_arguments(2, 1, "--time", "10")
    job = launch(slurm, [*train_arguments(corpus, run_dir, STEPS), "--from-step", str(2 * EVERY)], *arguments)
    assert slurm.wait_for_end(job) == "FAILED"
    log = log_of(run_dir)
    assert "__0_0.distcp" in log[-1], log[-5:]
    assert log[-2].startswith("--- rank "), log[-5:]
    assert slurm.shown(job, "ExitCode").startswith("2:")


@pytest.mark.full
def test_job_with_torchrun_launcher_saves_and_requeues_on_signal(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Start one task per node; the signal to the batch shell must still reach the ranks."""
    run_dir = tmp_path / "run"
    arguments = launch_arguments(2, 2, "--launcher", "torchrun", "--time", "10")
    job = launch(slurm, train_arguments(corpus, run_dir, 20), *arguments)
    past(run_dir, 3)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_for_end(job) == "COMPLETED", log_of(run_dir)[-30:]
    assert events_of(run_dir)[1:4] == ["started", "saved", "requeued"]
    assert read(run_dir).column("step") == list(range(1, 21))


@pytest.mark.full
def test_job_cancelled_is_not_requeued(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = launch(slurm, train_arguments(corpus, run_dir, 5_000), *launch_arguments(1, 1, "--time", "10"))
    past(run_dir, 2)
    slurm.call("scancel", job)
    assert slurm.wait_for_end(job) == "CANCELLED"  # the state after its batch script has ended
    assert slurm.shown(job, "Restarts") == "0"
    assert not slurm.ranks(job)
    assert "requeued" not in events_of(run_dir)
