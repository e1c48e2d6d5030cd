"""Run attempts of the command, and after each decide whether to restart it, requeue the job, or end."""

import argparse
import os
import time
from typing import Dict, List, Optional, Sequence

from .agent import DONE, SAVED, USER_ERROR, AttemptResult, LaunchAgent, StopRequest, SupervisorOptions
from .log import EventLog, log_line, open_standard_files, write
from .slurm import SlurmJob, check_nodes

# SLURM ends the script of a requeued job within this time
REQUEUED_SECONDS = 120.0


def parse_options(arguments: Sequence[str]) -> SupervisorOptions:
    """Parse the command line. Exits with status 2 on a mistake, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="supervisor",
        description="Run COMMAND (srun ...) inside a SLURM job: restart it when it fails, requeue the job when it"
        " was saved, end it when it hangs.",
    )
    parser.add_argument("--folder", required=True, help="folder of the run's SLURM files, shared by all nodes")
    parser.add_argument("--restarts", type=int, default=3, help="most failures in a row without a new checkpoint")
    parser.add_argument("--requeues", type=int, default=200, help="most requeues of the job")
    parser.add_argument("--start-seconds", type=float, default=1800.0, help="until the first heartbeat; 0: no limit")
    parser.add_argument("--grace-seconds", type=float, default=30.0, help="for the command to end, once a rank has")
    parser.add_argument("--stop-signal", choices=("USR1", "TERM"), default="USR1", help="TERM where srun runs torchrun")
    parser.add_argument("--check-path", action="append", default=[], metavar="DIR", help="writable on every node")
    parser.add_argument("--check-program", action="append", default=[], metavar="PATH", help="present on every node")
    parser.add_argument("--min-free-gib", type=float, default=1.0, help="free on each --check-path")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    given = vars(parser.parse_args(arguments))
    given["check_paths"], given["check_programs"] = given.pop("check_path"), given.pop("check_program")
    if given["command"][:1] == ["--"]:
        given["command"] = given["command"][1:]
    if not given["command"]:
        parser.error("no command; write `-- srun ... ettin train ...` at the end")
    return SupervisorOptions(**given)


def main(arguments: Sequence[str]) -> int:
    """Run the supervisor.

    Returns:
        Exit status of the batch script: 0 done, 1 stopped for bad numbers, 2 user error, 75 saved, else the command's.
    """
    options = parse_options(arguments)
    open_standard_files()
    try:
        return Supervisor(options, SlurmJob(os.environ), StopRequest()).run()
    except OSError as error:
        # the command or the folder does not work, so another attempt would fail too
        log_line("{}: {}".format(error.filename or options.folder, error.strerror or error))
        return USER_ERROR


class Supervisor:
    """Supervisor of one run of the job's batch script."""

    def __init__(self, options: SupervisorOptions, job: SlurmJob, stop: StopRequest) -> None:
        self.options, self.job, self.stop = options, job, stop
        self.events = EventLog(options.folder, job.name)

    def run(self) -> int:
        """Check the nodes, then run attempts until one decides the exit status; return it."""
        options = self.options
        self.events.add("started", restarts=self.job.restarts, nodes=self.job.node_list)
        problems = check_nodes(
            self.job, options.folder, options.check_paths, options.check_programs, options.min_free_gib
        )
        if problems:
            return self._exclude_nodes(problems)
        attempt = 0
        status: Optional[int] = None
        while status is None:
            status = self._after(LaunchAgent(options, self.job, self.stop, attempt).run())
            attempt += 1
        return status

    def _after(self, attempt: AttemptResult) -> Optional[int]:
        """Record how an attempt ended. Return the exit status, or None to run another attempt."""
        step, saved_step = attempt.heartbeat.get("step"), attempt.heartbeat.get("saved_step")
        if attempt.result == "done":
            self.events.add("done", step=step)
            return DONE
        if attempt.result == "saved":
            self.events.add("saved", step=step, saved_step=saved_step)
            return self._requeue("stopped with step {} saved".format(saved_step or 0), SAVED)
        if attempt.result == "mistake":
            self.events.add("mistake")
            self._log_failure(attempt)
            return 1 if attempt.failure is not None and attempt.failure.category == "stopped" else USER_ERROR
        host = attempt.failure.host if attempt.failure else None
        why = attempt.why or "exit status {}".format(attempt.status)
        self.events.add("failed", result=attempt.result, node=host, saved_step=saved_step, why=why)
        return self._after_failure(attempt)

    def _after_failure(self, attempt: AttemptResult) -> Optional[int]:
        """Decide what to do after a failed attempt. Return the exit status, or None to run another attempt.

        Up to `restarts` failures: run another attempt, or requeue if a step is stuck or a stop was requested. Beyond:
        requeue without the node that failed most often (at least twice) if there are spare nodes, else end.
        """
        status, failures = (attempt.status if attempt.status > 0 else 1), self.events.failures()
        if attempt.why:
            log_line("{}; the command was ended".format(attempt.why))
        if len(failures) <= self.options.restarts:
            if attempt.stuck or self.stop.name:
                why = "a step of the job cannot be ended" if attempt.stuck else "failed while it was asked to stop"
                return self._requeue(why, status, attempt)
            self._log_failure(attempt)
            log_line(
                "starting again ({} of {} times without a new checkpoint)".format(len(failures), self.options.restarts)
            )
            return None
        nodes = [str(failure["node"]) for failure in failures if failure.get("node")]
        worst = max(sorted(set(nodes)), key=nodes.count) if nodes else ""
        if nodes.count(worst) > 1 and self.job.has_spares(self.job.excluded() + [worst]):
            return self._requeue("{} failed {} times".format(worst, nodes.count(worst)), status, attempt, [worst])
        log_line("{} failures in a row without a new checkpoint; giving up".format(len(failures)))
        self._log_failure(attempt)
        return status

    def _exclude_nodes(self, problems: Dict[str, List[str]]) -> int:
        """Requeue the job without the unusable nodes if there are enough others. Return the exit status."""
        names = sorted(problems)
        for node in names:
            self.events.add("failed", result="node", node=node, why=problems[node][0])
            for problem in problems[node]:
                log_line("node {}: {}".format(node, problem))
        if not self.job.has_spares(self.job.excluded() + names):
            return USER_ERROR
        return self._requeue("without {}".format(", ".join(names)), USER_ERROR, exclude=names)

    def _requeue(
        self, why: str, status: int, attempt: Optional[AttemptResult] = None, exclude: Sequence[str] = ()
    ) -> int:
        """Requeue the job, unless it was cancelled or requeued too often. Return `status`, after SLURM's TERM."""
        self._log_failure(attempt)
        if self.job.restarts >= self.options.requeues:
            log_line(
                "{}; requeued {} times already, which is the limit: submit it again".format(why, self.job.restarts)
            )
            return status
        state = self.job.state()
        if self.job.id and state != "RUNNING":
            log_line("{}; not requeued, because the job is {}".format(why, state or "unknown to SLURM"))
            return status
        self.events.add("requeued", why=why, excluded=list(exclude))
        log_line("{}; requeued{}".format(why, ", to run without " + ", ".join(exclude) if exclude else ""))
        refused = self.job.requeue(exclude)
        if refused is not None:
            log_line("not requeued: {}; submit it again to go on".format(refused))
            return status
        self.stop.name = ""
        deadline = time.monotonic() + REQUEUED_SECONDS
        while not self.stop.name and time.monotonic() < deadline:
            time.sleep(0.1)
        return status

    def _log_failure(self, attempt: Optional[AttemptResult]) -> None:
        if attempt is not None and attempt.failure is not None:
            write(attempt.failure.describe() + "\n")
