"""Query and requeue the SLURM job that this process runs in, and check its nodes. Outside of a job, do nothing."""

import json
import os
import re
import subprocess
import sys
import time
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

from .log import log_line

# timeout of a SLURM command, whose controller may be busy
PATIENCE_SECONDS = 20.0
# most attempts to change the excluded nodes, 0.2 s apart
EXCLUDE_TRIES = 50
# states of nodes that the job may get
USABLE_STATES = "idle,mixed,alloc,completing"
# timeout of the check: the first access to a shared file system may be slow on thousands of nodes
CHECK_SECONDS = 120.0


class CommandResult(NamedTuple):
    """Result of a SLURM command."""

    status: int
    text: str
    """Standard output, or the last line of standard error if the output is empty."""


def run_command(command: Sequence[str]) -> CommandResult:
    """Run a SLURM command in a new session, so that signals to this process do not reach it. Status 1 on any error."""
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
    """Expand SLURM's list of nodes, such as `n[1-3]`, to names, in order; empty if SLURM does not answer."""
    if not node_list:
        return []
    result = run_command(["scontrol", "show", "hostnames", node_list])
    return result.text.split() if result.status == 0 else []


class SlurmJob:
    """The SLURM job that this process runs in; outside of one, `id` is empty.

    `name` is the id of the job or array task (`12` or `12_3`), `restarts` the number of its requeues.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.id = environment.get("SLURM_JOB_ID", "")
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self.name = "{}_{}".format(array, task) if array and task else self.id
        self.restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
        self.nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
        self.node_list = environment.get("SLURM_JOB_NODELIST", "")
        self.partition = environment.get("SLURM_JOB_PARTITION", "")

    def state(self) -> str:
        """Return the job's state, such as RUNNING or COMPLETING; empty if SLURM does not answer."""
        result = run_command(["squeue", "-h", "-j", self.id, "-o", "%T"]) if self.id else CommandResult(1, "")
        return result.text.split()[0] if result.status == 0 and result.text else ""

    def steps(self) -> List[str]:
        """Return the ids of the job's steps, except the batch step; empty if SLURM does not answer."""
        result = run_command(["squeue", "-h", "-s", "-j", self.id, "-o", "%i"]) if self.id else CommandResult(1, "")
        return [step for step in result.text.split() if re.search(r"\.\d+$", step)] if result.status == 0 else []

    def signal_steps(self, name: str) -> None:
        """Send the signal `name` to the tasks but not to srun, which on TERM would kill the tasks soon after."""
        for step in self.steps():
            run_command(["scancel", "--signal=" + name, step])

    def wait_for_steps(self, seconds: float) -> bool:
        """Wait until all steps have ended; return False if one has not after `seconds` (its slurmstepd may be gone)."""
        deadline = time.monotonic() + seconds
        while self.steps():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def excluded(self) -> List[str]:
        """Return the names of the nodes that are excluded for the job (ExcNodeList)."""
        match = re.search(r"ExcNodeList=(\S+)", run_command(["scontrol", "show", "job", self.id]).text)
        return [] if match is None or match.group(1) == "(null)" else expand_hosts(match.group(1))

    def has_spares(self, without: Sequence[str]) -> bool:
        """Return whether the partition has enough usable nodes for the job without the nodes `without`."""
        command = ["sinfo", "-h", "-N", "-t", USABLE_STATES, "-o", "%N"]
        result = run_command(command + (["-p", self.partition] if self.partition else []))
        return result.status == 0 and len(set(result.text.split()) - set(without)) >= self.nodes

    def requeue(self, exclude: Sequence[str] = ()) -> Optional[str]:
        """Put the job back into the queue, to run without the nodes `exclude`. Return None, or why it was refused.

        SLURM ends this process soon after. The excluded nodes of a job can be changed only while it is pending. So they
        are set after the requeue, in the seconds between SLURM's TERM and its KILL.
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
    """Run check_node.py on all nodes of the job concurrently.

    Args:
        job: the job.
        folder: shared folder of the run's SLURM files.
        paths: folders that must be writable on each node.
        programs: programs that each node must have.
        min_free_gib: free space in GiB that each folder must have.

    Returns:
        Node -> its problems, without the nodes that have none; empty outside of SLURM.
    """
    hosts = expand_hosts(job.node_list)
    if not hosts:
        if job.node_list:
            log_line("the nodes are not checked, because SLURM does not name them: {}".format(job.node_list))
        return {}
    folder = os.path.abspath(folder)
    shared_file = os.path.join(folder, ".tmp-seen-by-all-{}-{}".format(job.id, job.restarts))
    try:
        with open(shared_file, "w") as file:
            file.write("\n")
        files, paths = [shared_file], list(paths)
    except OSError:
        # each node then reports why it cannot write to the folder
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
    """Run the check; return node -> the problems that it printed, or srun's error for a node that printed nothing."""
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
