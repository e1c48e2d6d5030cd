"""Run the command once: start it, forward signals, watch its heartbeat, read the failure reports of its ranks."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from types import FrameType
from typing import Any, Dict, List, NamedTuple, Optional

from . import failed_rank
from .log import log_line, write
from .slurm import SlurmJob

POLL_SECONDS = 0.5
# time for srun and its steps to end after KILL
KILL_SECONDS = 10.0
# further time for the steps, if srun did not end within KILL_SECONDS
STUCK_SECONDS = 2.0
# below the range from which systems assign ports to connections
FIRST_PORT, PORTS = 15000, 17000
# exit statuses
DONE, SAVED, USER_ERROR = 0, 75, 2
# phase in a run's last heartbeat -> result of the attempt
FINAL_PHASES = {"done": "done", "stopped": "saved"}
STOPPED_EARLY = "asked to stop before it had begun"


class SupervisorOptions(NamedTuple):
    """Options of the supervisor's command line."""

    folder: str
    """Folder of the run's SLURM files, such as attempts and events."""
    restarts: int
    """Most failures in a row without a new checkpoint."""
    requeues: int
    """Most requeues of the job."""
    start_seconds: float
    """Longest time to the first heartbeat; 0: no limit."""
    grace_seconds: float
    """Time for the command to end, once a rank has ended."""
    stop_signal: str
    """Signal that asks the command to save and end: USR1 or TERM (torchrun)."""
    check_paths: List[str]
    """Folders that must be writable on every node."""
    check_programs: List[str]
    """Programs that every node must have."""
    min_free_gib: float
    """Free space in GiB that each of `check_paths` must have."""
    command: List[str]
    """Command to run: srun and its arguments."""


class StopRequest:
    """Handler of TERM, USR1 and INT. `name` is the first signal received, such as SIGUSR1; empty before it."""

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.name = self.name or signal.Signals(number).name


class AttemptResult(NamedTuple):
    """Result of one run of the command."""

    result: str
    """done, saved, mistake (a restart would repeat it), failed or hung."""
    status: int
    """Exit status of the command."""
    failure: Optional[failed_rank.TaskExit]
    """Rank that failed first; None if none is known."""
    heartbeat: Dict[str, Any]
    """The run's last heartbeat; empty if there was none."""
    why: str
    """Reason why the supervisor or the ranks' watchdogs ended it; empty if it ended by itself."""
    stuck: bool
    """True if a step of the job is still there after it was killed."""


def read_heartbeat(folder: str) -> Dict[str, Any]:
    """Return the last heartbeat in an attempt's folder; empty before the first."""
    try:
        with open(os.path.join(folder, "heartbeat.json"), encoding="utf-8") as file:
            content = json.load(file)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def free_port(job: SlurmJob, attempt: int) -> int:
    """Return a free port of this host; the search starts at a number that depends on the job and the attempt."""
    digits = int("".join(c for c in job.id if c.isdigit()) or os.getpid())
    for offset in range(PORTS):
        port = FIRST_PORT + (digits * 31 + attempt + 7 * offset) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port from {} on".format(FIRST_PORT))


class LaunchAgent:
    """One run of the command."""

    def __init__(self, options: SupervisorOptions, job: SlurmJob, stop: StopRequest, attempt: int) -> None:
        self.options, self.job, self.stop = options, job, stop
        name = "{}.{}.{}".format(job.name or os.getpid(), job.restarts, attempt)
        self.folder = os.path.abspath(os.path.join(options.folder, "attempts", name))
        os.makedirs(self.folder, exist_ok=True)
        self.port = free_port(job, attempt)
        self.srun_exits: List[failed_rank.TaskExit] = []
        self.stuck = False

    def run(self) -> AttemptResult:
        """Run the command until it ends, or until it hangs and is killed. Return how it ended."""
        environment = dict(os.environ, ETTIN_ATTEMPT_DIR=self.folder, MASTER_PORT=str(self.port))
        process = subprocess.Popen(
            self.options.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        why = self._wait(process)
        reader.join(KILL_SECONDS)
        heartbeat, why = read_heartbeat(self.folder), failed_rank.stall_line(self.folder) or why
        result = self._result(process.returncode, heartbeat, why)
        failure = failed_rank.first_failure(self.folder, self.srun_exits)
        return AttemptResult(result, process.returncode, failure, heartbeat, why, self.stuck)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        """Copy the command's standard error to this process's, and keep srun's reports of failed tasks."""
        assert process.stderr is not None
        for line in process.stderr:
            write(line)
            task = failed_rank.from_srun(line)
            if task is not None:
                self.srun_exits.append(task)

    def _wait(self, process: "subprocess.Popen[str]") -> str:
        """Wait for the command to end, or kill it. Return why it was killed; empty if it ended by itself."""
        forwarded = False
        heartbeat: Dict[str, Any] = {}
        first_end: Optional[float] = None
        changed = stop_time = time.monotonic()
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            latest = read_heartbeat(self.folder)
            if latest != heartbeat:
                heartbeat, changed = latest, now
            if self.stop.name and not forwarded:
                # a signal would kill ranks that are still importing, so wait; they have no progress to lose
                if heartbeat.get("doing", "starting") != "starting":
                    log_line("{}: asking the run to save and end".format(self.stop.name))
                    self._ask_to_stop(process)
                    forwarded = True
                elif now - stop_time > self.options.grace_seconds:
                    return self._end(process, STOPPED_EARLY)
            stop_time = stop_time if self.stop.name else now
            limit = heartbeat.get("limit_seconds", self.options.start_seconds) or float("inf")
            if now - changed > limit:
                return self._end(process, "nothing moved for {:.0f} s ({})".format(now - changed, describe(heartbeat)))
            finished = heartbeat.get("doing") in FINAL_PHASES
            if first_end is None and (finished or self.srun_exits or failed_rank.from_files(self.folder)):
                first_end = now
            if first_end is not None and now - first_end > self.options.grace_seconds:
                what = "the run" if finished else "a rank"
                return self._end(
                    process, "{} ended, but the command did not within {:.0f} s".format(what, now - first_end)
                )
        return ""

    def _ask_to_stop(self, process: "subprocess.Popen[str]") -> None:
        if self.options.stop_signal == "TERM" and self.job.id:
            self.job.signal_steps("TERM")
        else:
            process.send_signal(getattr(signal, "SIG" + self.options.stop_signal))

    def _end(self, process: "subprocess.Popen[str]", why: str) -> str:
        """Kill the command and its steps, return `why`; set `stuck` if a step stays (its slurmstepd may be gone)."""
        self.job.signal_steps("KILL")
        if not self.job.id:
            # in SLURM the command ends with its steps; outside of SLURM there are none
            process.kill()
        patience = KILL_SECONDS
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            patience = STUCK_SECONDS
        self.stuck = not self.job.wait_for_steps(patience)
        return why

    def _result(self, status: int, heartbeat: Dict[str, Any], why: str) -> str:
        """Return AttemptResult.result. The exit status counts last, because srun returns the largest of the ranks'."""
        if heartbeat.get("doing") in FINAL_PHASES:
            return FINAL_PHASES[heartbeat["doing"]]
        if why == STOPPED_EARLY:
            return "saved"
        if any(report.category in failed_rank.FINAL for report in failed_rank.from_files(self.folder)):
            return "mistake"
        if why:
            return "hung" if why.startswith(("nothing", "stalled")) else "failed"
        return {DONE: "done", SAVED: "saved"}.get(status, "failed")


def describe(heartbeat: Dict[str, Any]) -> str:
    """Return a heartbeat's phase and step as text for the log."""
    if not heartbeat:
        return "before the run's first heartbeat"
    phase = str(heartbeat.get("doing"))
    return "{} after step {}".format(phase, heartbeat["step"]) if "step" in heartbeat else phase
