"""Scripts of `ettin launch`: options of sbatch, environment, arrays of runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_ettin.config.resolve import from_yaml
from tests.launch.scripts import CALL, ONE_NODE, write_scripts


def test_launch_script_holds_options_overrides_and_config(tmp_path: Path) -> None:
    options = [
        "--nodes",
        "8",
        "--gpus-per-node",
        "8",
        "--cpus-per-task",
        "12",
        "--time",
        "24:00:00",
        "--account",
        "a b",
    ]
    (text,) = write_scripts(tmp_path, [*options, "--sbatch-arg=--exclusive"], [*CALL, "parallel.tp=2"]).values()
    folder = tmp_path / "run" / "slurm"
    for line in (
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--account='a b'",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --signal=B:USR1@300\n" in text
    assert "#SBATCH --exclusive\n" in text
    assert f"--folder {folder}" in text
    assert "    parallel.tp=2\n" in text
    config = from_yaml(folder / "17m-mlm-pretrain.config.yaml")
    assert (config.parallel.tp, config.run.size) == (2, "17m")
    done = subprocess.run(["python3", folder / "supervisor", "--help"], capture_output=True, text=True, check=True)
    assert "requeue the job when it was saved" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("launcher", "threads"), [("srun", "${SLURM_CPUS_PER_TASK:-1}"), ("torchrun", "12")], ids=["srun", "torchrun"]
)
def test_launch_threads_are_the_cores_of_one_rank(tmp_path: Path, launcher: str, threads: str) -> None:
    """Under torchrun a SLURM task holds all ranks of a node, so each rank gets its share of the task's cores."""
    (text,) = write_scripts(tmp_path, [*ONE_NODE, "--launcher", launcher], CALL).values()
    assert f"export OMP_NUM_THREADS={threads}\n" in text
    assert f"#SBATCH --cpus-per-task={12 if launcher == 'srun' else 96}\n" in text


def test_launch_ranks_are_bound_next_to_their_gpus(tmp_path: Path) -> None:
    (text,) = write_scripts(tmp_path, ONE_NODE, CALL).values()
    assert "--cpu-bind=cores --distribution=block:block" in text


def test_launch_script_sets_no_async_error_handling(tmp_path: Path) -> None:
    (text,) = write_scripts(tmp_path, ONE_NODE, CALL).values()
    assert "ASYNC_ERROR_HANDLING" not in text


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        (["--sbatch-arg=--exclusive"], ["--mem=0"]),
        (["--sbatch-arg=--exclusive", "--mem", "64G"], ["--mem=64G"]),
        (["--sbatch-arg=--exclusive", "--sbatch-arg=--mem-per-gpu=8G"], ["--mem-per-gpu=8G"]),
        ([], []),
    ],
)
def test_launch_exclusive_nodes_request_all_memory(tmp_path: Path, options: list[str], memory: list[str]) -> None:
    (text,) = write_scripts(tmp_path, [*ONE_NODE, *options], CALL).values()
    assert [line.removeprefix("#SBATCH ") for line in text.splitlines() if "SBATCH --mem" in line] == memory


def test_launch_suite_writes_one_array_script_per_phase(tmp_path: Path) -> None:
    call = ["train", "--phase", "all", "data.mixture=corpus"]
    scripts = write_scripts(tmp_path, ["--suite", *ONE_NODE, "--at-once", "4"], call)
    assert sorted(scripts) == ["run-decay", "run-extend", "run-pretrain"]
    assert all("#SBATCH --array=0-11%4\n" in text for text in scripts.values())
    member = tmp_path / "run" / "size=1b_objective=clm"
    last = next(line for line in scripts["run-decay"].splitlines() if line.startswith("11)"))
    assert last == f"11) run={member}/decay words=(--size 1b --objective clm --init-from {member}/extend) ;;"
    assert "--init-from" not in scripts["run-pretrain"]


def test_launch_sweep_copies_the_user_config_and_writes_each_config(tmp_path: Path) -> None:
    """Copy the user config, because a later edit must not change a waiting job."""
    (tmp_path / "mine.yaml").write_text("optim:\n  lr: 0.001\n")
    options = [*ONE_NODE, "--sweep", "run.seed=1,2"]
    (text,) = write_scripts(tmp_path, options, [*CALL, "--config", str(tmp_path / "mine.yaml")]).values()
    assert (tmp_path / "run" / "slurm" / "site.yaml").read_text() == "optim:\n  lr: 0.001\n"
    assert f"--config {tmp_path}/run/slurm/site.yaml\n" in text
    assert " words=(run.seed=2) ;;" in text
    snapshots = sorted((tmp_path / "run" / "slurm").glob("*.config.yaml"))
    assert [from_yaml(path).run.seed for path in snapshots] == [1, 2]
