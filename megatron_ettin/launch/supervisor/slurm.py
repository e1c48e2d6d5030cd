"""SLURM's commands, as far as a job needs them about itself. Outside of a job nothing is asked and nothing done."""

import re
import subprocess
import time
from typing import List, Mapping, NamedTuple, Optional, Sequence

PATIENCE_SECONDS = 20.0  # for a controller that is busy
EXCLUDE_TRIES = 50
USABLE_STATES = "idle,mixed,alloc,completing"


class Answer(NamedTuple):
    status: int
    text: str  # standard output, or where that is empty the last line of standard error


def ask(command: Sequence[str]) -> Answer:
    """Run a command of SLURM's, away from the signals that this process gets. Never raises."""
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
        return Answer(1, str(error))
    told = done.stdout.strip() or (done.stderr.strip().splitlines() or [""])[-1]
    return Answer(done.returncode, told)


class Job:
    """The job this process is in; `id` is empty outside of one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.id = environment.get("SLURM_JOB_ID", "")
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self.name = "{}_{}".format(array, task) if array and task else self.id
        self.restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
        self.nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
        self.node_list = environment.get("SLURM_JOB_NODELIST", "")
        self.partition = environment.get("SLURM_JOB_PARTITION", "")

    def state(self) -> str:
        """RUNNING, COMPLETING, ...; empty where it cannot be found out."""
        answer = ask(["squeue", "-h", "-j", self.id, "-o", "%T"]) if self.id else Answer(1, "")
        return answer.text.split()[0] if answer.status == 0 and answer.text else ""

    def steps(self) -> List[str]:
        """Ids of its steps but the batch script's own."""
        answer = ask(["squeue", "-h", "-s", "-j", self.id, "-o", "%i"]) if self.id else Answer(1, "")
        return [step for step in answer.text.split() if re.search(r"\.\d+$", step)] if answer.status == 0 else []

    def signal_steps(self, name: str) -> None:
        """To the tasks alone: srun, were it to get TERM itself, would have them killed soon after."""
        for step in self.steps():
            ask(["scancel", "--signal=" + name, step])

    def steps_gone(self, seconds: float) -> bool:
        """Whether all steps end within so many seconds. One whose slurmstepd was killed never does."""
        deadline = time.monotonic() + seconds
        while self.steps():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def excluded(self) -> List[str]:
        """Nodes that it may not run on."""
        match = re.search(r"ExcNodeList=(\S+)", ask(["scontrol", "show", "job", self.id]).text)
        if match is None or match.group(1) == "(null)":
            return []
        return ask(["scontrol", "show", "hostnames", match.group(1)]).text.split()

    def has_spares(self, without: Sequence[str]) -> bool:
        """Whether its partition has enough usable nodes without these."""
        command = ["sinfo", "-h", "-N", "-t", USABLE_STATES, "-o", "%N"]
        answer = ask(command + (["-p", self.partition] if self.partition else []))
        return answer.status == 0 and len(set(answer.text.split()) - set(without)) >= self.nodes

    def requeue(self, exclude: Sequence[str] = ()) -> Optional[str]:
        """Put the job back into the queue, to run on other nodes than `exclude`; why not, or None when it is done.

        SLURM ends this process soon after: a job's nodes can be changed only while it pends, which is from the requeue
        on, so that comes next, within the seconds between SLURM's TERM and its KILL."""
        if not self.id:
            return "not in a SLURM job"
        excluded = sorted(set(self.excluded()) | set(exclude)) if exclude else []
        answer = ask(["scontrol", "requeue", self.id])
        if answer.status != 0:
            return answer.text or "scontrol requeue failed"
        for _ in range(EXCLUDE_TRIES if excluded else 0):
            ask(["scontrol", "update", "JobId=" + self.id, "ExcNodeList=" + ",".join(excluded)])
            if set(excluded) <= set(self.excluded()):
                break
            time.sleep(0.2)  # the job does not pend yet
        return None
