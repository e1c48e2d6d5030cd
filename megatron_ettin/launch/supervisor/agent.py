"""One attempt: the command runs, signals are passed on, its heartbeat is watched, what it leaves behind is read."""

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
from .options import Options
from .slurm import Job

POLL_SECONDS = 0.5
KILL_SECONDS = 10.0
STUCK_SECONDS = 2.0  # more, for the step of an srun that did not end in that time
FIRST_PORT, PORTS = 15000, 17000  # below the range that systems hand out by themselves
DONE, SAVED, MISTAKE = 0, 75, 2
ENDS = {"done": "done", "stopped": "saved"}  # a run's last heartbeat, and what it makes of the attempt
STOPPED_EARLY = "asked to stop before it had begun"


class Stop:
    """SLURM's warning that the time is up, or the user's. The first one counts; more change nothing."""

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.name = self.name or signal.Signals(number).name


class Outcome(NamedTuple):
    """How an attempt ended. `result`: done, saved, mistake, failed or hung; `stuck`: its step is still there."""

    result: str
    status: int
    culprit: Optional[failed_rank.TaskExit]
    beat: Dict[str, Any]
    why: str
    stuck: bool


def read_beat(folder: str) -> Dict[str, Any]:
    """The last heartbeat; empty before the first."""
    try:
        with open(os.path.join(folder, "heartbeat.json"), encoding="utf-8") as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def free_port(job: Job, attempt: int) -> int:
    """A port of this host that nothing holds, begun to look for where two jobs and two attempts do not meet."""
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

    def __init__(self, options: Options, job: Job, stop: Stop, attempt: int) -> None:
        self.options, self.job, self.stop = options, job, stop
        name = "{}.{}.{}".format(job.name or os.getpid(), job.restarts, attempt)
        self.folder = os.path.abspath(os.path.join(options.folder, "attempts", name))
        os.makedirs(self.folder, exist_ok=True)
        self.port = free_port(job, attempt)
        self.said: List[failed_rank.TaskExit] = []
        self.stuck = False

    def run(self) -> Outcome:
        """Until the command has ended, or was ended because it hung."""
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
        beat, why = read_beat(self.folder), failed_rank.stall(self.folder) or why
        result = self._result(process.returncode, beat, why)
        ended = failed_rank.first(self.folder, self.said)
        return Outcome(result, process.returncode, ended, beat, why, self.stuck)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        """Pass the command's errors on, and keep what srun says of tasks."""
        assert process.stderr is not None
        for line in process.stderr:
            write(line)
            ended = failed_rank.from_srun(line)
            if ended is not None:
                self.said.append(ended)

    def _wait(self, process: "subprocess.Popen[str]") -> str:
        """Returns why the command was ended; empty where it ended by itself."""
        told_to_stop = False
        beat: Dict[str, Any] = {}
        over: Optional[float] = None
        changed = asked = time.monotonic()
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            latest = read_beat(self.folder)
            if latest != beat:
                beat, changed = latest, now
            if self.stop.name and not told_to_stop:
                # ranks that are still importing would be killed by a signal; with nothing done, nothing is lost
                if beat.get("doing", "starting") != "starting":
                    log_line("{}: asks the run to save and end".format(self.stop.name))
                    self._pass_on(process)
                    told_to_stop = True
                elif now - asked > self.options.grace_seconds:
                    return self._end(process, STOPPED_EARLY)
            asked = asked if self.stop.name else now
            limit = beat.get("limit_seconds", self.options.start_seconds) or float("inf")
            if now - changed > limit:
                return self._end(process, "nothing moved for {:.0f} s ({})".format(now - changed, describe(beat)))
            finished = beat.get("doing") in ENDS
            if over is None and (finished or self.said or failed_rank.from_files(self.folder)):
                over = now
            if over is not None and now - over > self.options.grace_seconds:
                what = "the run" if finished else "a rank"
                return self._end(process, "{} ended, the command not within {:.0f} s of it".format(what, now - over))
        return ""

    def _pass_on(self, process: "subprocess.Popen[str]") -> None:
        """Ask the ranks to save and end."""
        if self.options.stop_signal == "TERM" and self.job.id:
            self.job.signal_steps("TERM")
        else:
            process.send_signal(getattr(signal, "SIG" + self.options.stop_signal))

    def _end(self, process: "subprocess.Popen[str]", why: str) -> str:
        """Kill the command and its step, which SLURM itself may wait for for ever (a slurmstepd that was killed)."""
        self.job.signal_steps("KILL")
        if not self.job.id:  # there are no steps, of which the command would wait for the end
            process.kill()
        patience = KILL_SECONDS
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            patience = STUCK_SECONDS
        self.stuck = not self.job.steps_gone(patience)
        return why

    def _result(self, status: int, beat: Dict[str, Any], why: str) -> str:
        """By what the run itself said last, then by the status: of many ranks' statuses srun gives the largest."""
        if beat.get("doing") in ENDS:
            return ENDS[beat["doing"]]
        if why == STOPPED_EARLY:
            return "saved"
        if any(ended.kind in failed_rank.FINAL for ended in failed_rank.from_files(self.folder)):
            return "mistake"
        if why:
            return "hung" if why.startswith(("nothing", "stalled")) else "failed"
        return {DONE: "done", SAVED: "saved"}.get(status, "failed")


def describe(beat: Dict[str, Any]) -> str:
    """What a heartbeat says, in words."""
    if not beat:
        return "before the run's first heartbeat"
    return "{} after step {}".format(beat.get("doing"), beat["step"]) if "step" in beat else str(beat.get("doing"))
