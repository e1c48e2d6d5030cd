"""Ask SLURM about the own job, requeue it, and check its nodes. Outside of a job nothing is asked and nothing done."""

import json
import os
import re
import subprocess
import sys
import time
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

# a controller may be busy
PATIENCE_SECONDS = 20.0
EXCLUDE_TRIES = 50
USABLE_STATES = "idle,mixed,alloc,completing"
# a file system may be cold, on thousands of nodes
CHECK_SECONDS = 120.0


class CommandResult(NamedTuple):
    """Result of a SLURM command."""

    status: int
    text: str
    """Standard output, or the last line of standard error where that is empty."""


def run_command(command: Sequence[str]) -> CommandResult:
    """Run a command of SLURM in a session of its own, away from this process's signals. Never raises."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=PATIENCE_SECONDS,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CommandResult(1, str(error))
    text = done.stdout.strip() or (done.stderr.strip().splitlines() or [""])[-1]
    return CommandResult(done.returncode, text)


def expand_hosts(node_list: str) -> List[str]:
    """Expand SLURM's list of nodes to names, in order."""
    return run_command(["scontrol", "show", "hostnames", node_list]).text.split() if node_list else []


class SlurmJob:
    """The job this process runs in; `id` is empty outside of one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.id = environment.get("SLURM_JOB_ID", "")
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self.name = "{}_{}".format(array, task) if array and task else self.id
        self.restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
        self.nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
        self.node_list = environment.get("SLURM_JOB_NODELIST", "")
        self.partition = environment.get("SLURM_JOB_PARTITION", "")

    def state(self) -> str:
        """Return RUNNING, COMPLETING, ...; empty where SLURM does not answer."""
        result = run_command(["squeue", "-h", "-j", self.id, "-o", "%T"]) if self.id else CommandResult(1, "")
        return result.text.split()[0] if result.status == 0 and result.text else ""

    def steps(self) -> List[str]:
        """Return the ids of the job's steps, without the batch script's own."""
        result = run_command(["squeue", "-h", "-s", "-j", self.id, "-o", "%i"]) if self.id else CommandResult(1, "")
        return [step for step in result.text.split() if re.search(r"\.\d+$", step)] if result.status == 0 else []

    def signal_steps(self, name: str) -> None:
        """Signal the tasks alone: srun itself, on TERM, would have them killed soon after."""
        for step in self.steps():
            run_command(["scancel", "--signal=" + name, step])

    def wait_for_steps(self, seconds: float) -> bool:
        """Return whether all steps end within so many seconds. One whose slurmstepd was killed never does."""
        deadline = time.monotonic() + seconds
        while self.steps():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def excluded(self) -> List[str]:
        """Return the nodes that the job may not run on."""
        match = re.search(r"ExcNodeList=(\S+)", run_command(["scontrol", "show", "job", self.id]).text)
        return [] if match is None or match.group(1) == "(null)" else expand_hosts(match.group(1))

    def has_spares(self, without: Sequence[str]) -> bool:
        """Return whether the partition has enough usable nodes without these."""
        command = ["sinfo", "-h", "-N", "-t", USABLE_STATES, "-o", "%N"]
        result = run_command(command + (["-p", self.partition] if self.partition else []))
        return result.status == 0 and len(set(result.text.split()) - set(without)) >= self.nodes

    def requeue(self, exclude: Sequence[str] = ()) -> Optional[str]:
        """Put the job back into the queue, to run on other nodes than `exclude`. Returns None, or why it was refused.

        SLURM ends this process soon after. A job's nodes can be changed only while it is pending, which is from the
        requeue on, so that comes next, within the seconds between SLURM's TERM and its KILL.
        """
        if not self.id:
            return "not in a SLURM job"
        excluded = sorted(set(self.excluded()) | set(exclude)) if exclude else []
        result = run_command(["scontrol", "requeue", self.id])
        if result.status != 0:
            return result.text or "scontrol requeue failed"
        for _ in range(EXCLUDE_TRIES if excluded else 0):
            run_command(["scontrol", "update", "JobId=" + self.id, "ExcNodeList=" + ",".join(excluded)])
            if set(excluded) <= set(self.excluded()):
                break
            # the job is not pending yet
            time.sleep(0.2)
        return None


def check_nodes(
    job: SlurmJob, folder: str, paths: Sequence[str], programs: Sequence[str], min_free_gib: float
) -> Dict[str, List[str]]:
    """Run check_node.py on every node of the job at once. Returns problems by node; none outside of SLURM.

    Arguments: the shared folder of the run's SLURM files, folders that must be writable on each node, programs that
    each node must have, and the room that each folder must have left.
    """
    hosts = expand_hosts(job.node_list)
    if not hosts:
        return {}
    folder = os.path.abspath(folder)
    shared_file = os.path.join(folder, ".tmp-seen-by-all-{}-{}".format(job.id, job.restarts))
    try:
        with open(shared_file, "w") as file:
            file.write("\n")
        files, paths = [shared_file], list(paths)
    except OSError:
        # then each node reports why it cannot write there
        files, paths = [], list(paths) + [folder]
    wanted = {
        # the ranks meet at the first host
        "names": hosts[:1],
        "files": files,
        "programs": list(programs),
        "paths": paths,
        "min_free_gib": min_free_gib,
    }
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "check_node.py")
    srun = ["srun", "--overlap", "--nodes={}".format(len(hosts)), "--ntasks={}".format(len(hosts))]
    srun += ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus=0", "--export=ALL", "--job-name=check"]
    try:
        return _run_check(srun + [sys.executable, program, json.dumps(wanted)], hosts)
    finally:
        if os.path.exists(shared_file):
            os.unlink(shared_file)


def _run_check(command: Sequence[str], hosts: Sequence[str]) -> Dict[str, List[str]]:
    """Return problems by node: what the nodes print, and srun's line for a node that prints nothing."""
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, start_new_session=True
    )
    timed_out = ""
    try:
        output, errors = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
        timed_out = "did not answer within {:.0f} s".format(CHECK_SECONDS)
    problems: Dict[str, List[str]] = {}
    answered = set()
    for line in output.splitlines():
        match = re.match(r"(\S+?)(?:: (.+)| ok)$", line)
        if match is None:
            continue
        answered.add(match.group(1))
        if match.group(2):
            problems.setdefault(match.group(1), []).append(match.group(2))
    for host in hosts:
        if host not in answered:
            lines = [line for line in errors.splitlines() if host in line] or errors.splitlines()[-1:]
            why = lines[0].strip() if lines else "srun printed nothing"
            problems[host] = [timed_out or "the check could not run ({})".format(why)]
    return problems
