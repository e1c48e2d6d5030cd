"""Run the command once: start it, forward signals, watch its heartbeat, read what its ranks left."""

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
KILL_SECONDS = 10.0
# more, for the step of an srun that did not end within KILL_SECONDS
STUCK_SECONDS = 2.0
# below the range that systems hand out by themselves
FIRST_PORT, PORTS = 15000, 17000
DONE, SAVED, USER_ERROR = 0, 75, 2
# a run's last heartbeat, and the attempt's result that follows from it
FINAL_PHASES = {"done": "done", "stopped": "saved"}
STOPPED_EARLY = "asked to stop before it had begun"


class SupervisorOptions(NamedTuple):
    """The supervisor's command line, parsed."""

    folder: str
    """The run's SLURM files: attempts and events."""
    restarts: int
    """Most failures in a row without a new checkpoint."""
    requeues: int
    """Most requeues of the job."""
    start_seconds: float
    """Longest time to the first heartbeat; 0: no limit."""
    grace_seconds: float
    """Time for the command to end, once a rank has ended."""
    stop_signal: str
    """USR1 or TERM."""
    check_paths: List[str]
    check_programs: List[str]
    min_free_gib: float
    command: List[str]


class StopRequest:
    """The warning that the time is up, from SLURM or the user. The first one counts; later ones change nothing."""

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.name = self.name or signal.Signals(number).name


class AttemptResult(NamedTuple):
    """Result of one attempt."""

    result: str
    """done, saved, mistake, failed or hung."""
    status: int
    """Exit status of the command."""
    failure: Optional[failed_rank.TaskExit]
    """Rank that failed first."""
    heartbeat: Dict[str, Any]
    """The run's last heartbeat."""
    why: str
    """Reason why the command was ended; empty where it ended by itself."""
    stuck: bool
    """Whether its step cannot be ended."""


def read_heartbeat(folder: str) -> Dict[str, Any]:
    """Return the last heartbeat; empty before the first."""
    try:
        with open(os.path.join(folder, "heartbeat.json"), encoding="utf-8") as file:
            content = json.load(file)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def free_port(job: SlurmJob, attempt: int) -> int:
    """Return a free port of this host. The search starts where neither two jobs nor two attempts meet."""
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
    """Runs the command once."""

    def __init__(self, options: SupervisorOptions, job: SlurmJob, stop: StopRequest, attempt: int) -> None:
        self.options, self.job, self.stop = options, job, stop
        name = "{}.{}.{}".format(job.name or os.getpid(), job.restarts, attempt)
        self.folder = os.path.abspath(os.path.join(options.folder, "attempts", name))
        os.makedirs(self.folder, exist_ok=True)
        self.port = free_port(job, attempt)
        self.srun_exits: List[failed_rank.TaskExit] = []
        self.stuck = False

    def run(self) -> AttemptResult:
        """Run until the command has ended, or was ended because it hung."""
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
        """Pass the command's errors on, and keep what srun reports of tasks."""
        assert process.stderr is not None
        for line in process.stderr:
            write(line)
            task = failed_rank.from_srun(line)
            if task is not None:
                self.srun_exits.append(task)

    def _wait(self, process: "subprocess.Popen[str]") -> str:
        """Wait for the command. Returns why it was ended; empty where it ended by itself."""
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
                # a signal would kill ranks that are still importing; with nothing done, nothing is lost
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
        """Kill the command and its step, for which SLURM may wait for ever (if its slurmstepd was killed)."""
        self.job.signal_steps("KILL")
        if not self.job.id:
            # outside of SLURM there are no steps whose end would end the command
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
        """Judge by the run's last heartbeat, then by the status: of many ranks' statuses srun gives the largest."""
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
    """Describe a heartbeat for the log."""
    if not heartbeat:
        return "before the run's first heartbeat"
    phase = str(heartbeat.get("doing"))
    return "{} after step {}".format(phase, heartbeat["step"]) if "step" in heartbeat else phase
