"""Write the sbatch script of a run, or of many, and submit it.

Examples:
  ettin launch --nodes 8 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00 --partition gpu --submit -- \\
      train --size 1b --objective mlm --phase pretrain --run-dir runs/1b-mlm data.mixture=data/corpus
  ettin launch --suite --nodes 4 --gpus-per-node 8 --cpus-per-task 12 --profile site.yaml --submit -- \\
      train --phase all --run-dir runs/suite data.mixture=data/corpus          # 6 sizes x 2 objectives x 3 phases
After `--` comes an `ettin train` or `ettin bench` command. With --phase all each phase is a job that waits for the
one before; --sweep and --suite make arrays. docs/slurm.md describes what a job does when it is preempted or fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError, nearest

if TYPE_CHECKING:
    from megatron_ettin.launch.request import BatchJob, Submission

COMMANDS = ("train", "bench")
SUITE = ("size=17m,32m,68m,150m,400m,1b", "objective=mlm,clm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nodes", type=int, required=True)
    add("--gpus-per-node", type=int, metavar="N", help="0: ranks without a GPU, --tasks-per-node of them")
    add("--tasks-per-node", type=int, metavar="N", help="ranks of a node; default: one for each GPU")
    add("--cpus-per-task", type=int, metavar="N", help="cores of a rank; required with GPUs")
    add("--time", help="minutes, HH:MM:SS or DAYS-HH:MM:SS; the job requeues itself after it")
    for name in ("account", "partition", "qos", "constraint", "reservation", "mem", "exclude"):
        add(f"--{name}", help="as for sbatch")
    add("--sbatch-arg", action="append", default=[], metavar="OPTION", help="one more option of sbatch, whole")
    add("--after", metavar="DEPENDENCY", help="for the first job, as sbatch's --dependency: afterok:1234")
    add("--profile", type=Path, metavar="SITE.yaml", help="the cluster's part of the script (examples/slurm/sites)")
    add("--container", metavar="IMAGE", help="run in this image, by the profile's container options")
    add("--env-file", type=Path, metavar="FILE", help="shell assignments read by the job, copied nowhere (tokens)")
    add("--launcher", choices=("srun", "torchrun"), default="srun", help="a task for each rank, or for each node")
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="an array with a run for each value")
    add("--suite", action="store_true", help="an array of the 6 sizes x 2 objectives")
    add("--at-once", type=int, metavar="N", help="most runs of an array at the same time")
    add("--restarts", type=int, default=3, help="most failures in a row without a new checkpoint (%(default)s)")
    add("--requeues", type=int, default=200, help="most requeues of each job (%(default)s)")
    add("--margin-seconds", type=int, help="save so long before the time limit: 300, or a quarter of the limit")
    add("--grace-seconds", type=int, default=30, help="for the other ranks to end, once one has (%(default)s)")
    add("--allow-unseen-data", action="store_true", help="allow data that only the nodes see, or that is made later")
    add("--submit", action="store_true", help="submit with sbatch; without it the script is only written")
    add("--dry-run", action="store_true", help="print the script and write nothing")
    add("--json", action="store_true", help="print folder, scripts and job ids as JSON")
    add("command", nargs=argparse.REMAINDER, metavar="-- train ...")


def run(args: argparse.Namespace) -> int:
    from megatron_ettin.launch.script import render_script
    from megatron_ettin.launch.submission import script_path, submit, why_never_starts, write_submission

    submission, jobs, missing = build_submission(args)
    if missing and not (args.dry_run or args.allow_unseen_data or submission.container):
        raise UserError(f"{missing[0]}; --allow-unseen-data where only the nodes see it, or an earlier job makes it")
    for line in missing:
        print(f"warning: {line}", file=sys.stderr)
    if args.dry_run:
        print("\n".join(render_script(job, submission) for job in jobs), end="")
        return 0
    ids: dict[str, str] = {}
    if args.submit:
        ids = submit(jobs, submission, args.after)
    else:
        write_submission(jobs, submission)
    if args.json:
        scripts = [{"script": str(script_path(job, submission)), "job": ids.get(job.name)} for job in jobs]
        print(json.dumps({"folder": str(submission.folder), "jobs": scripts}))
        return 0
    for job in jobs:
        many = f"{len(job.runs)} runs of " if job.is_array else ""
        print(f"{script_path(job, submission)}: {many}{submission.allocation.world_size} ranks")
        if job.name in ids:
            print(f"  job {ids[job.name]}; `ettin status {ids[job.name]}` follows it")
            if reason := why_never_starts(ids[job.name]):
                print(f"warning: SLURM reports that it cannot start: {reason}", file=sys.stderr)
    if not ids:
        print("not submitted: look at it, then `sbatch FILE`, or again with --submit")
    return 0


def build_submission(args: argparse.Namespace) -> tuple[Submission, list[BatchJob], list[str]]:
    """Build the submission and check it as far as that is possible here.

    Returns:
        What its jobs have in common, the jobs, and a line for each dataset that does not exist here.

    Raises:
        UserError: for a mistake of the command line, the profile or the command after `--`.
    """
    from megatron_ettin.cli.launch_jobs import missing_data, parse_command, split_into_jobs
    from megatron_ettin.launch.profile import read_profile
    from megatron_ettin.launch.request import Submission, build_allocation, resolve_margin

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words or words[0] not in COMMANDS:
        given = f"found {words[0]!r}{nearest(words[0], COMMANDS)}" if words else "found nothing"
        raise UserError(f"what follows `--` must be train or bench and its options, {given}")
    check_options(args)
    profile = read_profile(args.profile)
    allocation = build_allocation(args, profile)
    launched = parse_command(words[0], words[1:], [*(SUITE if args.suite else ()), *args.sweep])
    if args.container and not (profile.container_srun or profile.container_prefix):
        raise UserError("--container: the profile sets neither container_srun nor container_prefix; set one")
    submission = Submission(
        folder=(launched.base / "slurm").absolute(),
        allocation=allocation,
        profile=profile,
        launcher=args.launcher,
        container=args.container or profile.container,
        env_file=args.env_file.absolute() if args.env_file else None,
        restarts=args.restarts,
        requeues=args.requeues,
        margin_seconds=resolve_margin(args.margin_seconds, allocation.time),
        grace_seconds=args.grace_seconds,
        command_line=shlex.join(["ettin", "launch", *sys.argv[2:]]) if sys.argv[1:2] == ["launch"] else "ettin launch",
        cwd=Path.cwd(),
    )
    jobs = split_into_jobs(launched, allocation.world_size, args.at_once)
    return submission, jobs, missing_data(launched)


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for an option that is out of range or cannot be read."""
    for name, least in (("restarts", 0), ("requeues", 0), ("grace_seconds", 1), ("at_once", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.env_file is not None and not args.env_file.is_file():
        raise UserError(f"--env-file {args.env_file}: no such file")
    if args.after is not None and not args.submit:
        raise UserError("--after: needs --submit")
