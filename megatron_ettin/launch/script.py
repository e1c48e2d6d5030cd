"""Write the sbatch script of a job, as plain shell that its user can read, change and submit again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatron_ettin import __version__
from megatron_ettin.launch.request import BatchJob, Submission

# exported unless the profile sets them
ENVIRONMENT = {
    # makes kernels and communication start in the order in which they were issued
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_DEBUG": "WARN",
}
# command of each task with torchrun; the command of the ranks follows as arguments
TORCHRUN = (
    "exec torchrun --nnodes=$SLURM_NNODES --nproc-per-node={ranks} --node-rank=$SLURM_NODEID"
    ' --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT --no-python "$@"'
)


def render_script(job: BatchJob, submission: Submission) -> str:
    """Return the text of the job's sbatch script."""
    parts = [_header(job, submission), *_environment(submission), *_choose_run(job), *_command(job)]
    return "\n".join([*parts, *_launch(job, submission)]) + "\n"


def _header(job: BatchJob, submission: Submission) -> str:
    """Return the first lines of the script, with the options of sbatch."""
    allocation, torchrun = submission.allocation, submission.launcher == "torchrun"
    options = {"job-name": job.name, "nodes": str(allocation.nodes)}
    options["ntasks-per-node"] = "1" if torchrun else str(allocation.tasks_per_node)
    if allocation.gpus_per_node:
        options["gpus-per-node"] = str(allocation.gpus_per_node)
    if allocation.cpus_per_task:
        options["cpus-per-task"] = str(allocation.cpus_per_task * (allocation.tasks_per_node if torchrun else 1))
    if allocation.time:
        options["time"] = allocation.time
    options |= allocation.options
    if job.is_array:
        options["array"] = f"0-{len(job.runs) - 1}" + (f"%{job.max_parallel}" if job.max_parallel else "")
    options["output"] = f"{submission.folder}/{job.name}-{'%A_%a' if job.is_array else '%j'}.out"
    options["chdir"] = str(submission.cwd)
    options["signal"] = f"B:USR1@{submission.margin_seconds}"
    options |= {"open-mode": "append", "requeue": ""}
    lines = [f"#SBATCH --{name}{_directive_value(value)}" for name, value in options.items()]
    lines += [f"#SBATCH {option}" for option in allocation.extra_options]
    top = ["#!/bin/bash", f"# {submission.command_line}   (megatron_ettin {__version__})"]
    return "\n".join([*top, *lines, "set -eo pipefail"])


def _directive_value(value: str) -> str:
    """Return `=VALUE`, quoted if it has spaces, as sbatch reads it; empty for an option without a value."""
    if any(c.isspace() for c in value):
        value = shlex.quote(value)
    return f"={value}" if value else ""


def _environment(submission: Submission) -> list[str]:
    """Return the lines that set every rank's environment."""
    profile, allocation = submission.profile, submission.allocation
    lines = [""]
    if profile.setup.strip():
        lines += ["# of the site", profile.setup.strip(), ""]
    if path := profile.path or ("" if submission.container else _own_path()):
        lines.append(f"export PATH={_quoted_path(path)}:$PATH")
    threads = "${SLURM_CPUS_PER_TASK:-1}"
    if submission.launcher == "torchrun":
        lines.append('export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        # a task of srun is all ranks of its node
        threads = str(allocation.cpus_per_task or 1)
    if allocation.cpus_per_task:
        # since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    for name, value in ({"OMP_NUM_THREADS": threads} | ENVIRONMENT | profile.environment).items():
        lines.append(f"export {name}={value if value.startswith('$') else shlex.quote(value)}")
    if submission.env_file is not None:
        file = shlex.quote(str(submission.env_file))
        lines += ["# may hold tokens: read when the job runs, copied nowhere", f"set -a; source {file}; set +a"]
    return lines


def _own_path() -> str:
    """Return the folder of the running `ettin`, for nodes that share its file system; empty if it is not a program."""
    folder = Path(sys.executable).parent
    return str(folder) if (folder / "ettin").exists() else ""


def _quoted_path(path: str) -> str:
    return path if path.startswith("$") else shlex.quote(path)


def _choose_run(job: BatchJob) -> list[str]:
    """Return the lines that set `run`, and in an array also `words` (the run's arguments), by the task's index."""
    if not job.is_array:
        return ["", f"run={shlex.quote(str(job.runs[0].run_dir))}"]
    width = len(str(len(job.runs) - 1))
    lines = ["", "case $SLURM_ARRAY_TASK_ID in"]
    for index, run in enumerate(job.runs):
        lines.append(f"{index:>{width}}) run={shlex.quote(str(run.run_dir))} words=({shlex.join(run.arguments)}) ;;")
    return [*lines, "esac"]


def _command(job: BatchJob) -> list[str]:
    """Return the lines of the command that each rank runs."""
    lines = [f"ettin {job.command}"]
    if job.command == "train":
        lines.append('--run-dir "$run"')
    if job.is_array:
        lines.append('"${words[@]}"')
    elif job.runs[0].arguments:
        lines.append(shlex.join(job.runs[0].arguments))
    lines += _in_lines(job.arguments)
    return ["", "# every rank runs", "command=(", *(f"    {line}" for line in lines), ")"]


def _in_lines(arguments: tuple[str, ...]) -> list[str]:
    """Return the arguments as lines, each with an option and its value."""
    lines: list[str] = []
    for argument in arguments:
        is_value = lines and lines[-1].startswith("--") and " " not in lines[-1] and not argument.startswith("--")
        if is_value and "=" not in argument:
            lines[-1] += f" {shlex.quote(argument)}"
        else:
            lines.append(shlex.quote(argument))
    return lines


def _launch(job: BatchJob, submission: Submission) -> list[str]:
    """Return the lines that start the supervisor, and srun under it."""
    profile, folder = submission.profile, submission.folder
    values = {"container": submission.container, "folder": str(folder.parent), "cwd": str(submission.cwd)}
    site_options = profile.srun + (profile.container_srun if submission.container else [])
    srun = ["srun", "--kill-on-bad-exit=1", f"--job-name={job.command}"]
    srun += [option.format(**values) for option in site_options]
    prefix = [word.format(**values) for word in profile.container_prefix] if submission.container else []
    options = [f"--folder {shlex.quote(str(folder))}", f"--restarts {submission.restarts}"]
    options += [f"--requeues {submission.requeues}", f"--grace-seconds {submission.grace_seconds}"]
    if job.command != "train":
        # only `ettin train` writes a heartbeat, so no other command may be ended for lack of one
        options.append("--start-seconds 0")
    if submission.launcher == "torchrun":
        options.append("--stop-signal TERM")
    options += [f"--check-path {shlex.quote(path)}" for path in (str(folder.parent), *profile.check_paths)]
    if not submission.container:
        path = profile.path or _own_path()
        options.append(f"--check-program {_quoted_path(path) + '/' if path else ''}ettin")
    options.append(f"--min-free-gib {profile.min_free_gib:g}")
    ranks = '"${command[@]}"'
    if submission.launcher == "torchrun":
        task = shlex.quote(TORCHRUN.format(ranks=submission.allocation.tasks_per_node))
        ranks = f"bash -c {task} torchrun {ranks}"
    lines = [f"exec {shlex.quote(profile.python)} {shlex.quote(str(folder / 'supervisor'))}"]
    lines += [f"    {option}" for option in options]
    lines += [f"    -- {shlex.join(srun)}", "    " + " ".join(filter(None, [shlex.join(prefix), ranks]))]
    # backslashes continue one command over several lines
    return ["", "# checks the nodes, passes signals on, restarts, requeues", " \\\n".join(lines)]
