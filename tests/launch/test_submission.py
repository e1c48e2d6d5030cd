"""`ettin launch` without a run: the scripts it writes, its refusals, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.main import main
from megatron_ettin.cli.parsing import OneLineParser, format_arguments
from megatron_ettin.config.resolve import from_yaml
from megatron_ettin.launch.queue import covers
from megatron_ettin.launch.request import parse_time_limit, resolve_margin
from tests.launch.cluster import ROOT, Cluster
from tests.launch.jobs import ETTIN, PATH, launch_words, train_words

CALL = ["train", "--size", "17m", "--objective", "mlm", "--phase", "pretrain", "data.mixture=corpus"]
ONE_NODE = ["--nodes", "1", "--gpus-per-node", "8", "--cpus-per-task", "12"]
PROFILES = sorted((ROOT / "examples" / "slurm" / "sites").glob("*.yaml"))


def written(tmp_path: Path, options: list[str], call: list[str]) -> dict[str, str]:
    """Run `ettin launch`, let bash check the syntax of each script, and return the scripts by name."""
    words = ["launch", *options, "--allow-unseen-data", "--", *call, "--run-dir", str(tmp_path / "run")]
    assert main(words) == 0
    scripts = {path.stem: path.read_text() for path in (tmp_path / "run" / "slurm").glob("*.sbatch")}
    for text in scripts.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return scripts


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
    (text,) = written(tmp_path, [*options, "--sbatch-arg=--exclusive"], [*CALL, "parallel.tp=2"]).values()
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
    """Under torchrun SLURM's task is all ranks of a node, and its cores are theirs together."""
    (text,) = written(tmp_path, [*ONE_NODE, "--launcher", launcher], CALL).values()
    assert f"export OMP_NUM_THREADS={threads}\n" in text
    assert f"#SBATCH --cpus-per-task={12 if launcher == 'srun' else 96}\n" in text


def test_launch_ranks_are_bound_beside_their_gpus(tmp_path: Path) -> None:
    (text,) = written(tmp_path, ONE_NODE, CALL).values()
    assert "--cpu-bind=cores --distribution=block:block" in text


def test_launch_error_handling_is_left_to_torch(tmp_path: Path) -> None:
    (text,) = written(tmp_path, ONE_NODE, CALL).values()
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
def test_launch_whole_nodes_come_with_their_whole_memory(tmp_path: Path, options: list[str], memory: list[str]) -> None:
    (text,) = written(tmp_path, [*ONE_NODE, *options], CALL).values()
    assert [line.removeprefix("#SBATCH ") for line in text.splitlines() if "SBATCH --mem" in line] == memory


def test_launch_corpus_of_another_vocabulary_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*CALL[:-1], f"data.mixture={corpus}", "--run-dir", str(tmp_path / "run")]
    assert main(["launch", *ONE_NODE, "--allow-unseen-data", "--", *call]) == 2
    errors = capsys.readouterr().err
    assert "with a tokenizer of 320 entries, but model.vocab_size is 50,368; set model.vocab_size=320 or" in errors


def test_launch_dry_run_warns_of_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *ONE_NODE, "--dry-run", "--", *CALL, "data.validation=held"]) == 0
    warned = capsys.readouterr().err.splitlines()
    assert warned == [
        "warning: data.mixture: corpus: no dataset exists there",
        "warning: data.validation: held: no dataset exists there",
    ]


def test_launch_suite_writes_one_array_script_per_phase(tmp_path: Path) -> None:
    call = ["train", "--phase", "all", "data.mixture=corpus"]
    scripts = written(tmp_path, ["--suite", *ONE_NODE, "--at-once", "4"], call)
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
    (text,) = written(tmp_path, options, [*CALL, "--config", str(tmp_path / "mine.yaml")]).values()
    assert (tmp_path / "run" / "slurm" / "site.yaml").read_text() == "optim:\n  lr: 0.001\n"
    assert f"--config {tmp_path}/run/slurm/site.yaml\n" in text
    assert " words=(run.seed=2) ;;" in text
    snapshots = sorted((tmp_path / "run" / "slurm").glob("*.config.yaml"))
    assert [from_yaml(path).run.seed for path in snapshots] == [1, 2]


def test_launch_profile_sbatch_options_reach_the_script(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "gpus_per_node: 1\ncpus_per_task: 1\nsbatch: {exclusive: true, contiguous: false, comment: a b, time: 1-0}\n"
    )
    (text,) = written(tmp_path, ["--nodes", "1", "--profile", str(tmp_path / "site.yaml")], CALL).values()
    for line in ("--exclusive", "--comment='a b'", "--time=1-0"):
        assert f"#SBATCH {line}\n" in text
    assert "contiguous" not in text


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_launch_example_profiles_give_valid_scripts(tmp_path: Path, profile: Path) -> None:
    (text,) = written(tmp_path, ["--nodes", "2", "--profile", str(profile)], CALL).values()
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "{" not in text.split("command=(")[1].replace("${command[@]}", "")
    container = {"pyxis": "--container-image=/shared", "apptainer": "apptainer exec --nv"}.get(profile.stem)
    assert container is None or container in text


@pytest.mark.parametrize(
    ("time", "given", "margin"),
    [
        (None, None, 300),
        ("24:00:00", None, 300),
        ("UNLIMITED", None, 300),
        ("10", None, 150),
        ("1", None, 15),
        ("1-0", 7200, 7200),
        ("2:30", 149, 149),
        ("1-01:30", 91_799, 91_799),
    ],
)
def test_resolve_margin_of_time_limit_is_a_fraction_unless_given(
    time: str | None, given: int | None, margin: int
) -> None:
    assert resolve_margin(given, time) == margin


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("1:30", 90), ("1:00:30", 3630), ("2-3", 183_600), ("1-00:01:01", 86_461)]
)
def test_parse_time_limit_matches_sbatch_and_limits_the_margin(time: str, seconds: int) -> None:
    assert parse_time_limit(time) == seconds
    with pytest.raises(UserError, match=f"--margin-seconds {seconds}: must be less than --time {time}"):
        resolve_margin(seconds, time)


REFUSED = [
    (["--nodes", "1"], CALL, "--gpus-per-node: say how many, or 0 with --tasks-per-node"),
    (["--nodes", "1", "--gpus-per-node", "1", "--cpus-per-task", "0"], CALL, "--cpus-per-task 0: must be at least 1"),
    ([*ONE_NODE, "--margin-seconds", "0"], CALL, "--margin-seconds 0: must be at least 1"),
    (["--nodes", "0", "--gpus-per-node", "1"], CALL, "--nodes 0: must be at least 1"),
    (["--nodes", "1", "--gpus-per-node", "0"], CALL, "--tasks-per-node 0: must be at least 1"),
    (["--nodes", "1", "--gpus-per-node", "1"], CALL, "--cpus-per-task: say how many cores each rank gets"),
    (ONE_NODE, CALL, "data.mixture: corpus: no dataset exists there; --allow-unseen-data"),
    (ONE_NODE, [*CALL, "data.order=none.npy"], "no dataset exists there"),
    ([*ONE_NODE, "--time", "soon"], CALL, "--time soon: write minutes"),
    ([*ONE_NODE], ["eval", "x"], "must be train or bench and its options, found 'eval'"),
    ([*ONE_NODE], [*CALL, "model.nun_layers=3"], "num_layers"),
    (
        ["--nodes", "1", "--gpus-per-node", "7", "--cpus-per-task", "1"],
        [*CALL, "parallel.tp=2"],
        "= 2 does not divide 7 ranks",
    ),
    ([*ONE_NODE], [*CALL, "--dry-run"], "--dry-run: not possible in a job"),
    ([*ONE_NODE, "--suite"], CALL, "--objective: the sweep sets it"),
    ([*ONE_NODE, "--container", "x"], CALL, "--container: the profile sets neither"),
    ([*ONE_NODE, "--env-file", "none"], CALL, "--env-file none: no such file"),
    ([*ONE_NODE, "--after", "afterok:1"], CALL, "--after: needs --submit"),
    (["--nodes", "1", "--profile", "none.yaml"], CALL, "--profile none.yaml: No such file"),
]


@pytest.mark.parametrize(("options", "call", "expected"), REFUSED)
def test_launch_refusal_is_one_line_and_leaves_no_files(
    tmp_path: Path, options: list[str], call: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *options, "--", *call, "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ettin launch: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sbtach: {}\n", "no key 'sbtach' (did you mean 'sbatch'?)"),
        ("srun: --x\n", "srun must be list[str], is '--x'"),
        ("gpus_per_node: many\n", "gpus_per_node must be int | None, is 'many'"),
        ("gpus_per_node: -1\n", "gpus_per_node -1: must be at least 0"),
        ("container_prefix: ['{image}']\n", "only {container}, {folder}, {cwd} are known"),
        ("sbatch: {--partition: gpu}\n", "'--partition': write a long option without its dashes"),
        ("sbatch: {nodes: 4}\n", "'nodes' is set by `ettin launch`"),
        ("environment: {A B: 1}\n", "'A B' is not the name of a variable"),
        ("[1]\n", "holds no keys"),
        ("a: [\n", "not YAML"),
    ],
)
def test_launch_bad_profile_is_refused_in_one_line(
    tmp_path: Path, content: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.yaml").write_text(content)
    words = ["--nodes", "1", "--profile", str(tmp_path / "site.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main(["launch", *words[:4], "--", *CALL, *words[4:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert str(tmp_path / "site.yaml") in line


def test_launch_sbatch_refusal_is_quoted_and_leaves_no_files(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    call = ["train", *train_words(corpus, tmp_path / "runs" / "a", 5)]
    for options, expected in ((["--partition", "nosuch"], "nvalid partition"), (["--nodes", "9"], "Node count")):
        done = slurm.call(ETTIN, "launch", *launch_words(2, 1), *options, "--submit", "--", *call, PATH=PATH)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("ettin launch: sbatch refused 17m-mlm-pretrain: ")
        assert expected in line
        assert not (tmp_path / "runs").exists()


def test_launch_refusal_restores_files_of_an_earlier_launch(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Restore the files of an earlier launch that a refused one has overwritten."""
    call = ["train", *train_words(corpus, tmp_path / "run", 5)]
    assert slurm.call(ETTIN, "launch", *launch_words(2, 1), "--", *call, PATH=PATH).returncode == 0
    folder = tmp_path / "run" / "slurm"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = ["--time", "99", "--after", "nonsense:1", "--submit"]
    done = slurm.call(ETTIN, "launch", *launch_words(2, 1), *options, "--", *call, PATH=PATH)
    assert done.returncode == 2
    assert "dependency" in done.stderr.lower()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_launch_second_job_of_pending_run_needs_after(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    options = launch_words(2, 1, "--sbatch-arg=--begin=now+600", "--submit")
    call = ["--", "train", *train_words(corpus, tmp_path / "run", 5)]
    assert slurm.call(ETTIN, "launch", *options, *call, PATH=PATH).returncode == 0
    again = slurm.call(ETTIN, "launch", *options, *call, PATH=PATH)
    (line,) = again.stderr.splitlines()
    job = line.split("job ")[1].split()[0]
    assert again.returncode == 2
    assert f"is PENDING; scancel it first, or give --after afterany:{job}" in line
    after = slurm.call(ETTIN, "launch", *options, "--after", f"afterany:{job}", "--json", *call, PATH=PATH)
    assert after.returncode == 0, after.stderr
    slurm.call("scancel", job, json.loads(after.stdout)["jobs"][0]["job"])


def test_status_of_unknown_job_or_run_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    for what, expected in (
        ("999999", "SLURM does not know it"),
        ("nothing", "no such folder"),
        (tmp_path, "no run in it"),
    ):
        done = slurm.call(ETTIN, "status", what, PATH=PATH)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "no squeue answers" in slurm.call(ETTIN, "status", PATH=str(Path(ETTIN).parent)).stderr


def test_words_of_parsed_arguments_round_trip() -> None:
    from megatron_ettin.cli import train

    parser = OneLineParser()
    train.add_arguments(parser)
    words = ["--init-from", "a b", "--allow-change", "optim.lr", "--allow-change", "run.seed", "optim.lr=1", "x.y=2"]
    args = parser.parse_intermixed_args(words)
    assert format_arguments(parser, args, ()) == words
    assert format_arguments(parser, args, ("init_from", "allow_change")) == ["optim.lr=1", "x.y=2"]


@pytest.mark.parametrize(
    ("job", "task", "is_covered"),
    [
        ("7", "7", True),
        ("7_[2-5%1]", "7_3", True),
        ("7_2-5,9%2", "7_9", True),
        ("7_3", "7_4", False),
        ("7", None, False),
    ],
)
def test_covers_array_job_matches_its_tasks(job: str, task: str | None, is_covered: bool) -> None:
    assert covers(job, task) is is_covered


def test_launch_json_lists_folder_and_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(["launch", *ONE_NODE, "--allow-unseen-data", "--json", "--", *CALL, "--run-dir", str(run_dir)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "folder": str(run_dir / "slurm"),
        "jobs": [{"script": str(run_dir / "slurm" / "17m-mlm-pretrain.sbatch"), "job": None}],
    }
