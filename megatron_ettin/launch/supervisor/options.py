"""The supervisor's command line."""

import argparse
from typing import List, NamedTuple, Sequence


class Options(NamedTuple):
    """As parsed. `restarts` and `requeues` are limits; `folder` takes attempts and events."""

    folder: str
    restarts: int
    requeues: int
    start_seconds: float
    grace_seconds: float
    stop_signal: str
    check_paths: List[str]
    check_programs: List[str]
    min_free_gib: float
    command: List[str]


def parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="supervisor",
        description="Run COMMAND (srun ...) inside a SLURM job: restart it when it fails, requeue the job when it"
        " was saved, end it when it hangs.",
    )
    parser.add_argument("--folder", required=True, help="of the run's SLURM files, shared by all nodes")
    parser.add_argument("--restarts", type=int, default=3, help="in a row without a new checkpoint")
    parser.add_argument("--requeues", type=int, default=200, help="of the job, in all")
    parser.add_argument("--start-seconds", type=float, default=1800.0, help="until the first heartbeat; 0: no limit")
    parser.add_argument("--grace-seconds", type=float, default=30.0, help="for the command to end, once a rank has")
    parser.add_argument("--stop-signal", choices=("USR1", "TERM"), default="USR1", help="TERM where srun runs torchrun")
    parser.add_argument("--check-path", action="append", default=[], metavar="DIR", help="writable on every node")
    parser.add_argument("--check-program", action="append", default=[], metavar="PATH", help="there on every node")
    parser.add_argument("--min-free-gib", type=float, default=1.0, help="on each --check-path")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("no command; write `-- srun ... ettin train ...` at the end")
    return Options(
        given.folder,
        given.restarts,
        given.requeues,
        given.start_seconds,
        given.grace_seconds,
        given.stop_signal,
        given.check_path,
        given.check_program,
        given.min_free_gib,
        command,
    )
