"""What follows from how an attempt ended: again, back into the queue, or over."""

import os
import time
from typing import Dict, List, Optional, Sequence

from .agent import DONE, MISTAKE, SAVED, LaunchAgent, Outcome, Stop
from .events import Events
from .log import log_line, open_standard_files, write
from .nodes import check_nodes
from .options import Options, parse
from .slurm import Job

REQUEUED_SECONDS = 120.0  # until SLURM ends the script of a job that was requeued


def main(arguments: Sequence[str]) -> int:
    """The batch script's exit status: 0 done, 2 a mistake, 75 saved, else as the command's."""
    options = parse(arguments)
    open_standard_files()
    try:
        return Supervisor(options, Job(os.environ), Stop()).run()
    except OSError as error:  # of the command or the folder: no other attempt mends it
        log_line("{}: {}".format(error.filename or options.folder, error.strerror or error))
        return MISTAKE


class Supervisor:
    """One run of the job's batch script."""

    def __init__(self, options: Options, job: Job, stop: Stop) -> None:
        self.options, self.job, self.stop = options, job, stop
        self.events = Events(options.folder, job.name)

    def run(self) -> int:
        """Check the nodes, then attempt after attempt."""
        self.events.add("started", restarts=self.job.restarts, nodes=self.job.node_list)
        bad = check_nodes(self.options, self.job)
        if bad:
            return self._without(bad)
        attempt = 0
        status: Optional[int] = None
        while status is None:
            status = self._after(LaunchAgent(self.options, self.job, self.stop, attempt).run())
            attempt += 1
        return status

    def _after(self, outcome: Outcome) -> Optional[int]:
        """Exit status, or None for another attempt."""
        step, saved_step = outcome.beat.get("step"), outcome.beat.get("saved_step")
        if outcome.result == "done":
            self.events.add("done", step=step)
            return DONE
        if outcome.result == "saved":
            self.events.add("saved", step=step, saved_step=saved_step)
            return self._requeue("stopped with step {} saved".format(saved_step or 0), SAVED)
        if outcome.result == "mistake":
            self.events.add("mistake")
            is_stopped = outcome.culprit is not None and outcome.culprit.kind == "stopped"
            return self._over(outcome, 1 if is_stopped else MISTAKE)
        host = outcome.culprit.host if outcome.culprit else None
        why = outcome.why or "exit status {}".format(outcome.status)
        self.events.add("failed", result=outcome.result, node=host, saved_step=saved_step, why=why)
        return self._after_failure(outcome)

    def _after_failure(self, outcome: Outcome) -> Optional[int]:
        """Again here while that may help, then without the node that fails most, then not at all."""
        status, failures = (outcome.status if outcome.status > 0 else 1), self.events.failures()
        if outcome.why:
            log_line("{}; the command was ended".format(outcome.why))
        if len(failures) <= self.options.restarts:
            if outcome.stuck or self.stop.name:
                why = "a step of the job cannot be ended" if outcome.stuck else "failed while it was to stop"
                return self._requeue(why, status, outcome)
            self._tell(outcome)
            log_line(
                "starting again ({} of {} times without a new checkpoint)".format(len(failures), self.options.restarts)
            )
            return None
        nodes = [str(failure["node"]) for failure in failures if failure.get("node")]
        worst = max(sorted(set(nodes)), key=nodes.count) if nodes else ""
        if nodes.count(worst) > 1 and self.job.has_spares(self.job.excluded() + [worst]):
            return self._requeue("{} failed {} times".format(worst, nodes.count(worst)), status, outcome, [worst])
        log_line("{} failures without a new checkpoint in between; it ends here".format(len(failures)))
        return self._over(outcome, status)

    def _without(self, bad: Dict[str, List[str]]) -> int:
        """Some nodes cannot take part: go elsewhere where there is an elsewhere, or end."""
        names = sorted(bad)
        for node in names:
            self.events.add("failed", result="node", node=node, why=bad[node][0])
        elsewhere = self.job.has_spares(self.job.excluded() + names)
        for node in names:
            for problem in bad[node]:
                log_line("node {}: {}".format(node, problem))
        return self._requeue("without {}".format(", ".join(names)), MISTAKE, exclude=names) if elsewhere else MISTAKE

    def _requeue(self, why: str, status: int, outcome: Optional[Outcome] = None, exclude: Sequence[str] = ()) -> int:
        """Back into the queue, unless the job is over for SLURM (it was cancelled) or was there too often."""
        self._tell(outcome)
        if self.job.restarts >= self.options.requeues:
            log_line(
                "{}; requeued {} times already, which is the limit: submit it again".format(why, self.job.restarts)
            )
            return status
        state = self.job.state()
        if self.job.id and state != "RUNNING":
            log_line("{}; not requeued, for the job is {}".format(why, state or "unknown to SLURM"))
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

    def _over(self, outcome: Outcome, status: int) -> int:
        self._tell(outcome)
        return status

    def _tell(self, outcome: Optional[Outcome]) -> None:
        """The culprit's last lines."""
        if outcome is not None and outcome.culprit is not None:
            write(outcome.culprit.told() + "\n")
