"""The scripts of examples/slurm, as shipped: only sizes, and what a cluster of CPUs has not, are said differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import sentences
from tests.launch.cluster import ROOT, Cluster, lines_of, wait_until
from tests.launch.jobs import PATH
from tests.train.runs import TINY, read

EXAMPLES = ROOT / "examples" / "slurm"
SMALL = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10"]
WORDS = [*TINY, "run.steps=3", "parallel.distributed_optimizer=false"]


def submitted(
    cluster: Cluster, folder: Path, script: str, options: list[str], words: list[str], **variables: str
) -> str:
    """sbatch in `folder`; the job's number."""
    return cluster.submit("--chdir", folder, *SMALL, *options, EXAMPLES / script, *words, PATH=PATH, **variables)


def logs(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("**/*.out")) for line in lines_of(path)]


@pytest.mark.parametrize(("script", "nodes"), [("one_node", 1), ("eight_nodes", 2), ("sixty_four_nodes", 3)])
def test_a_run(slurm: Cluster, corpus: Path, tmp_path: Path, script: str, nodes: int) -> None:
    words = [word for word in WORDS if script != "one_node" or "distributed" not in word]
    name = f"{script}.sbatch"
    job = submitted(slurm, tmp_path, name, [f"--nodes={nodes}"], words, RUN="run", DATA=str(corpus))
    assert slurm.wait_for_end(job) == "COMPLETED", logs(tmp_path)[-30:]
    assert read(tmp_path / "run").column("step") == [1, 2, 3]
    history = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[0])
    assert history["world"] == nodes


def test_the_chain(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    variables = {"RUN": str(tmp_path / "run"), "DATA": str(corpus), "PATH": PATH}
    variables["SBATCH_ARGS"] = " ".join([*SMALL, f"--chdir={tmp_path}"])
    done = slurm.call("bash", EXAMPLES / "chain.sh", *WORDS, **variables)
    assert done.returncode == 0, done.stderr
    jobs = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert [slurm.wait_for_end(job) for job in jobs] == ["COMPLETED"] * 3, logs(tmp_path)[-30:]
    first = [read(tmp_path / "run" / phase).column("loss")[0] for phase in ("pretrain", "extend", "decay")]
    assert first[2] < first[0]
    origin = json.loads((tmp_path / "run" / "decay" / "history.jsonl").read_text().splitlines()[0])["init_from"]
    assert "/run/extend/checkpoints/step_000000003" in origin


def test_the_suite(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """One size of six; both objectives; of the three phases each after its own earlier one."""
    variables = {"RUN": str(tmp_path / "suite"), "DATA": str(corpus), "SIZES": "17m", "PATH": PATH}
    options = ["--nodes", "1", "--gpus-per-node", "1", "--cpus-per-task", "1", "--time", "10"]
    done = slurm.call("bash", EXAMPLES / "suite.sh", *options, "--", *WORDS, **variables)
    assert done.returncode == 0, done.stderr
    jobs = [line.split("job ")[1].split(";")[0] for line in done.stdout.splitlines() if "  job " in line]
    assert len(jobs) == 3

    def states() -> list[dict]:
        return json.loads(slurm.call("ettin", "status", tmp_path / "suite", "--json", PATH=PATH).stdout)

    wait_until(lambda: [state["last_event"] for state in states()] == ["done"] * 6, 240, "the last phase")
    assert {state["job"] for state in states()} == {f"{job}_{task}" for job in jobs for task in (0, 1)}


def test_prepare(slurm: Cluster, tiny_tokenizer: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": sentences(seed, 12)}) for seed in range(60)]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines) + "\n")
    variables = {"INPUT": str(tmp_path / "raw.jsonl"), "OUT": str(tmp_path / "dataset"), "PATH": PATH}
    options = ["--tokenizer", tiny_tokenizer, "--chunk-tokens", "48", "--workers", "1", "--slurm-time", "10", "--wait"]
    done = slurm.call("bash", EXAMPLES / "prepare.sh", *options, "--slurm-arg=mem=500M", timeout=240, **variables)
    assert done.returncode == 0, done.stderr
    inspected = slurm.call("ettin", "inspect", tmp_path / "dataset", PATH=PATH)
    assert "60 documents" in inspected.stdout, inspected.stdout


def test_bench(slurm: Cluster, tmp_path: Path) -> None:
    """Two nodes: what each of them measures goes into one file."""
    shape = [word for word in TINY if not word.startswith(("batch.", "metrics.", "checkpoint."))]
    words = ["--quick", *shape]
    job = submitted(slurm, tmp_path, "bench.sbatch", [], words, OUT=str(tmp_path / "bench.jsonl"))
    assert slurm.wait_for_end(job) == "COMPLETED", logs(tmp_path)[-30:]
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    layouts = [line["layout"] for line in lines if "tokens_per_second" in line]
    assert layouts == ["dp 2"] * 3 + ["tp 2 dp 1"] * 3
    assert (tmp_path / "bench.jsonl.png").stat().st_size > 1_000


def test_release(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    variables = {"RUN": str(tmp_path / "run"), "DATA": str(corpus)}
    job = submitted(slurm, tmp_path, "one_node.sbatch", [], WORDS, **variables)
    assert slurm.wait_for_end(job) == "COMPLETED", logs(tmp_path)[-30:]
    options = ["--cpus-per-task=2", "--mem=1G"]
    job = slurm.submit(
        "--chdir", tmp_path, *options, EXAMPLES / "release.sbatch", PATH=PATH, OUT=str(tmp_path / "out"), **variables
    )
    assert slurm.wait_for_end(job) == "COMPLETED", logs(tmp_path)[-30:]
    assert list((tmp_path / "out").glob("**/model.safetensors"))
