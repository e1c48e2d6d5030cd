"""The sbatch script of a job: plain shell that its user can read, change and submit again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatron_ettin import __version__
from megatron_ettin.launch.profile import filled
from megatron_ettin.launch.request import Job, Member, Work

# exported unless the profile says otherwise
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # communication begins in the order in which it was asked for
    "NCCL_DEBUG": "WARN",
}
TORCHRUN = (
    "exec torchrun --nnodes=$SLURM_NNODES --nproc-per-node={ranks} --node-rank=$SLURM_NODEID"
    ' --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT --no-python "$@"'
)


def script_of(job: Job, work: Work) -> str:
    """The whole text."""
    parts = [header(job, work), *environment(work), *runs(job), *command(job), *launch(job, work)]
    return "\n".join(parts) + "\n"


def header(job: Job, work: Work) -> str:
    """sbatch's options."""
    asked, torchrun = work.allocation, work.launcher == "torchrun"
    options = {"job-name": job.name, "nodes": str(asked.nodes)}
    options["ntasks-per-node"] = "1" if torchrun else str(asked.tasks_per_node)
    if asked.gpus_per_node:
        options["gpus-per-node"] = str(asked.gpus_per_node)
    if asked.cpus_per_task:
        options["cpus-per-task"] = str(asked.cpus_per_task * (asked.tasks_per_node if torchrun else 1))
    if asked.time:
        options["time"] = asked.time
    options |= asked.options
    if job.is_array:
        options["array"] = f"0-{len(job.members) - 1}" + (f"%{job.at_once}" if job.at_once else "")
    options["output"] = f"{work.folder}/{job.name}-{'%A_%a' if job.is_array else '%j'}.out"
    options["chdir"] = str(work.cwd)
    options["signal"] = f"B:USR1@{work.margin_seconds}"
    options |= {"open-mode": "append", "requeue": ""}
    lines = [f"#SBATCH --{name}{directive_value(value)}" for name, value in options.items()]
    lines += [f"#SBATCH {word}" for word in asked.more]
    top = ["#!/bin/bash", f"# {work.written_by}   (megatron_ettin {__version__})"]
    return "\n".join([*top, *lines, "set -eo pipefail"])


def directive_value(value: str) -> str:
    """`=VALUE` as sbatch reads it in a script, in quotes where it has spaces; nothing for an option without one."""
    if any(c.isspace() for c in value):
        value = shlex.quote(value)
    return f"={value}" if value else ""


def environment(work: Work) -> list[str]:
    """What every rank finds in its environment."""
    profile = work.profile
    lines = [""]
    if profile.setup.strip():
        lines += ["# of the site", profile.setup.strip(), ""]
    if path := profile.path or ("" if work.container else own_path()):
        lines.append(f"export PATH={quoted_path(path)}:$PATH")
    if work.launcher == "torchrun":
        lines.append('export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
    if work.allocation.cpus_per_task:  # which srun does not take over from sbatch since SLURM 22.05
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    for name, value in ({"OMP_NUM_THREADS": threads(work)} | ENVIRONMENT | profile.environment).items():
        lines.append(f"export {name}={value if value.startswith('$') else shlex.quote(value)}")
    if work.env_file is not None:
        file = shlex.quote(str(work.env_file))
        lines += ["# may hold tokens: read when the job runs, copied nowhere", f"set -a; source {file}; set +a"]
    return lines


def threads(work: Work) -> str:
    """Return the cores of one rank, for the shell. Under torchrun a task is all ranks of its node."""
    if work.launcher == "torchrun":
        return str(work.allocation.cpus_per_task or 1)
    return "${SLURM_CPUS_PER_TASK:-1}"


def own_path() -> str:
    """Where this very `ettin` is, for nodes that share its file system."""
    folder = Path(sys.executable).parent
    return str(folder) if (folder / "ettin").exists() else ""


def quoted_path(path: str) -> str:
    return path if path.startswith("$") else shlex.quote(path)


def runs(job: Job) -> list[str]:
    """Which run this is: of an array by the index of the task."""
    if not job.is_array:
        return ["", f"run={shlex.quote(str(job.members[0].run_dir))}"]
    width = len(str(len(job.members) - 1))
    lines = ["", "case $SLURM_ARRAY_TASK_ID in"]
    for index, member in enumerate(job.members):
        words = f" words=({shlex.join(member.words)})"
        lines.append(f"{index:>{width}}) run={shlex.quote(str(member.run_dir))}{words} ;;")
    return [*lines, "esac"]


def command(job: Job) -> list[str]:
    """What each rank runs."""
    own = ['"${words[@]}"'] if job.is_array else [quoted(job.members[0])] if job.members[0].words else []
    where = ['--run-dir "$run"'] if job.command == "train" else []
    lines = [f"ettin {job.command}", *where, *own, *in_lines(job.words)]
    return ["", "# every rank runs", "command=(", *(f"    {line}" for line in lines), ")"]


def quoted(member: Member) -> str:
    return shlex.join(member.words)


def in_lines(words: tuple[str, ...]) -> list[str]:
    """An option and its value on a line."""
    lines: list[str] = []
    for word in words:
        value = lines and lines[-1].startswith("--") and " " not in lines[-1] and not word.startswith("--")
        if value and "=" not in word:
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    return lines


def launch(job: Job, work: Work) -> list[str]:
    """The supervisor, and srun under it."""
    profile, folder = work.profile, work.folder
    places = {"container": work.container, "folder": str(folder.parent), "cwd": str(work.cwd)}
    srun = ["srun", "--kill-on-bad-exit=1", f"--job-name={job.command}", *filled(profile.srun, places)]
    srun += filled(profile.container_srun, places) if work.container else []
    prefix = filled(profile.container_prefix, places) if work.container else []
    options = [f"--folder {shlex.quote(str(folder))}", f"--restarts {work.restarts}", f"--requeues {work.requeues}"]
    options.append(f"--grace-seconds {work.grace_seconds}")
    if job.command != "train":  # only a run has a heartbeat
        options.append("--start-seconds 0")
    if work.launcher == "torchrun":
        options.append("--stop-signal TERM")
    options += [f"--check-path {shlex.quote(path)}" for path in (str(folder.parent), *profile.check_paths)]
    if not work.container:
        path = profile.path or own_path()
        options.append(f"--check-program {quoted_path(path) + '/' if path else ''}ettin")
    options.append(f"--min-free-gib {profile.min_free_gib:g}")
    ranks = '"${command[@]}"'
    if work.launcher == "torchrun":
        task = shlex.quote(TORCHRUN.format(ranks=work.allocation.tasks_per_node))
        ranks = f"bash -c {task} torchrun {ranks}"
    started = " ".join(filter(None, [shlex.join(prefix), ranks]))
    python = shlex.quote(profile.python)
    supervisor = shlex.quote(str(folder / "supervisor"))
    lines = [f"exec {python} {supervisor}", *(f"    {option}" for option in options)]
    lines += [f"    -- {shlex.join(srun)}", f"    {started}"]
    return ["", "# checks the nodes, passes signals on, restarts, requeues", *continued(lines)]


def continued(lines: list[str]) -> list[str]:
    """As one command over several lines."""
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
