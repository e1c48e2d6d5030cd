"""Run the scripts of examples/slurm, changed only in sizes and in options that a cluster of CPUs lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import sentences
from tests.launch.cluster import ROOT, Cluster, lines_of, wait_until
from tests.launch.forked import PACE_VARIABLE
from tests.launch.jobs import forked_path, profile
from tests.train.runs import TINY, read

pytestmark = pytest.mark.usefixtures("programs")
EXAMPLES = ROOT / "examples" / "slurm"
SMALL = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10"]
NODES = {"one_node": 1, "eight_nodes": 2, "sixty_four_nodes": 3}
ARGUMENTS = [*TINY, "run.steps=3", "parallel.distributed_optimizer=false"]


def submitted(
    cluster: Cluster, folder: Path, script: str, options: list[str], arguments: list[str], **variables: str
) -> str:
    """Submit with sbatch in `folder` and return the job's id."""
    return cluster.submit(
        "--chdir", folder, *SMALL, *options, EXAMPLES / script, *arguments, PATH=forked_path(), **variables
    )


def happened(run_dir: Path) -> list[str]:
    """Return the events of the run's jobs."""
    return [json.loads(line)["event"] for line in lines_of(run_dir / "slurm" / "events.jsonl")]


def logs(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("**/*.out")) for line in lines_of(path)]


@pytest.fixture(scope="module")
def ended(slurm: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Submit the scripts of one run at the same time, wait for the jobs, and return the folders of their output."""
    folders, jobs = {script: tmp_path_factory.mktemp(script) for script in NODES}, {}
    for script, nodes in NODES.items():
        arguments = [word for word in ARGUMENTS if script != "one_node" or "distributed" not in word]
        options = [f"--nodes={nodes}"]
        folder = folders[script]
        jobs[script] = submitted(slurm, folder, f"{script}.sbatch", options, arguments, RUN="run", DATA=str(corpus))
    for script, job in jobs.items():
        assert slurm.wait_for_end(job) == "COMPLETED", logs(folders[script])[-30:]
    return folders


@pytest.mark.parametrize("script", NODES)
def test_run_scripts_train_on_the_requested_nodes(ended: dict[str, Path], script: str) -> None:
    assert read(ended[script] / "run").column("step") == [1, 2, 3]
    history = json.loads((ended[script] / "run" / "history.jsonl").read_text().splitlines()[0])
    assert history["world"] == NODES[script]


@pytest.mark.full
def test_chain_script_starts_each_phase_from_the_one_before(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    variables = {"RUN": str(tmp_path / "run"), "DATA": str(corpus), "PATH": forked_path()}
    variables["SBATCH_ARGS"] = " ".join([*SMALL, f"--chdir={tmp_path}"])
    done = slurm.call("bash", EXAMPLES / "chain.sh", *ARGUMENTS, **variables)
    assert done.returncode == 0, done.stderr
    jobs = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert [slurm.wait_for_end(job) for job in jobs] == ["COMPLETED"] * 3, logs(tmp_path)[-30:]
    first = [read(tmp_path / "run" / phase).column("loss")[0] for phase in ("pretrain", "extend", "decay")]
    assert first[2] < first[0]
    origin = json.loads((tmp_path / "run" / "decay" / "history.jsonl").read_text().splitlines()[0])["init_from"]
    assert "/run/extend/checkpoints/step_000000003" in origin


@pytest.mark.full
def test_suite_script_runs_every_task_to_the_end(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Run one size of six and both objectives, each phase after its own earlier one."""
    variables = {"RUN": str(tmp_path / "suite"), "DATA": str(corpus), "SIZES": "17m", "PATH": forked_path()}
    variables[PACE_VARIABLE] = "1.0"  # slows the first phase, so that the queue still holds it when it is read
    options = ["--nodes", "1", "--gpus-per-node", "1", "--cpus-per-task", "1", "--time", "10", "--profile", profile()]
    done = slurm.call("bash", EXAMPLES / "suite.sh", *options, "--", *ARGUMENTS, **variables)
    assert done.returncode == 0, done.stderr
    jobs = [line.split("job ")[1].split(";")[0] for line in done.stdout.splitlines() if "  job " in line]
    assert len(jobs) == 3

    def states(*what: Path) -> list[dict]:
        answer = json.loads(slurm.call("ettin", "status", *what, "--json", PATH=forked_path()).stdout)
        return [state for state in answer if state["run"].startswith(str(tmp_path))]

    tasks = sorted(f"{job}_{task}" for job in jobs for task in (0, 1))
    assert sorted(state["job"] for state in states()) == tasks  # each job is listed once, whether it waits or runs
    wait_until(lambda: happened(tmp_path / "suite").count("done") == 6, 240, "the last phase")
    latest = states(tmp_path / "suite")
    assert [state["last_event"] for state in latest] == ["done"] * 6
    assert sorted(state["job"] for state in latest) == tasks


@pytest.mark.full
def test_prepare_script_writes_the_dataset(slurm: Cluster, tiny_tokenizer: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": sentences(seed, 12)}) for seed in range(60)]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines) + "\n")
    variables = {"INPUT": str(tmp_path / "raw.jsonl"), "OUT": str(tmp_path / "dataset"), "PATH": forked_path()}
    options = ["--tokenizer", tiny_tokenizer, "--chunk-tokens", "48", "--workers", "1", "--slurm-time", "10", "--wait"]
    done = slurm.call("bash", EXAMPLES / "prepare.sh", *options, "--slurm-arg=mem=500M", timeout=240, **variables)
    assert done.returncode == 0, done.stderr
    inspected = slurm.call("ettin", "inspect", tmp_path / "dataset", PATH=forked_path())
    assert "60 documents" in inspected.stdout, inspected.stdout


@pytest.mark.full
def test_bench_script_on_two_nodes_writes_one_results_file(slurm: Cluster, tmp_path: Path) -> None:
    """Run on two nodes; the measurements of both go into one file."""
    shape = [word for word in TINY if not word.startswith(("batch.", "metrics.", "checkpoint."))]
    arguments = ["--quick", *shape]
    job = submitted(slurm, tmp_path, "bench.sbatch", [], arguments, OUT=str(tmp_path / "bench.jsonl"))
    assert slurm.wait_for_end(job) == "COMPLETED", logs(tmp_path)[-30:]
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    layouts = [line["layout"] for line in lines if "tokens_per_second" in line]
    assert layouts == ["dp 2"] * 3 + ["tp 2 dp 1"] * 3
    assert (tmp_path / "bench.jsonl.png").stat().st_size > 1_000


@pytest.mark.full
def test_release_script_exports_the_model(slurm: Cluster, ended: dict[str, Path], tmp_path: Path) -> None:
    options = ["--chdir", tmp_path, "--cpus-per-task=2", "--mem=1G"]
    variables = {"RUN": str(ended["one_node"] / "run"), "OUT": str(tmp_path / "out")}
    job = slurm.submit(*options, EXAMPLES / "release.sbatch", "--workers", "1", PATH=forked_path(), **variables)
    assert slurm.wait_for_end(job) == "COMPLETED", logs(tmp_path)[-30:]
    assert list((tmp_path / "out").glob("**/model.safetensors"))
