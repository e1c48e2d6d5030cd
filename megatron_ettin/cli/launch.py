"""Write the sbatch script of a run, or of many, and submit it.

Examples:
  ettin launch --nodes 8 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00 --partition gpu --submit -- \\
      train --size 1b --objective mlm --phase pretrain --run-dir runs/1b-mlm data.mixture=data/corpus
  ettin launch --suite --nodes 4 --gpus-per-node 8 --cpus-per-task 12 --profile site.yaml --submit -- \\
      train --phase all --run-dir runs/suite data.mixture=data/corpus          # 6 sizes x 2 objectives x 3 phases
What follows `--` is a call of `ettin train` or `ettin bench`. Of --phase all every phase is a job that waits for the
one before; --sweep and --suite make arrays. docs/slurm.md tells what the job does when it is preempted or fails.
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
    from megatron_ettin.launch.request import Job, Work

COMMANDS = ("train", "bench")
SUITE = ("size=17m,32m,68m,150m,400m,1b", "objective=mlm,clm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nodes", type=int, required=True)
    add("--gpus-per-node", type=int, metavar="N", help="0: ranks without a GPU, of which --tasks-per-node tells")
    add("--tasks-per-node", type=int, metavar="N", help="ranks of a node; default: one for each GPU")
    add("--cpus-per-task", type=int, metavar="N", help="cores of a rank; with GPUs it has to be said")
    add("--time", help="minutes, HH:MM:SS or DAYS-HH:MM:SS; the job goes on after it by itself")
    for name in ("account", "partition", "qos", "constraint", "reservation", "mem", "exclude"):
        add(f"--{name}", help="as sbatch's")
    add("--sbatch-arg", action="append", default=[], metavar="OPTION", help="one more option of sbatch, whole")
    add("--after", metavar="DEPENDENCY", help="of the first job, as sbatch's --dependency: afterok:1234")
    add("--profile", type=Path, metavar="SITE.yaml", help="what of the script is the cluster's (examples/slurm/sites)")
    add("--container", metavar="IMAGE", help="run in it, as the profile says how")
    add("--env-file", type=Path, metavar="FILE", help="shell assignments read by the job, copied nowhere (tokens)")
    add("--launcher", choices=("srun", "torchrun"), default="srun", help="a task for each rank, or for each node")
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="an array, a run for each value")
    add("--suite", action="store_true", help="an array of the 6 sizes x 2 objectives")
    add("--at-once", type=int, metavar="N", help="members of an array that may run at the same time")
    add("--restarts", type=int, default=3, help="after failures in a row without a new checkpoint")
    add("--requeues", type=int, default=200, help="of each job, in all")
    add("--margin-seconds", type=int, help="to save before the time limit: 300, or a quarter of it")
    add("--grace-seconds", type=int, default=30, help="after one rank has ended, for the others to")
    add("--allow-unseen-data", action="store_true", help="data that only the nodes see, or that is yet to be made")
    add("--submit", action="store_true", help="hand it to sbatch; without it the script is written only")
    add("--dry-run", action="store_true", help="print the script and write nothing")
    add("--json", action="store_true", help="folder, scripts, job ids as JSON")
    add("command", nargs=argparse.REMAINDER, metavar="-- train ...")


def run(args: argparse.Namespace) -> int:
    from megatron_ettin.launch.script import script_of
    from megatron_ettin.launch.submission import held_for_good, script_path, submit, write

    work, jobs, unseen = requested(args)
    if unseen and not (args.dry_run or args.allow_unseen_data or work.container):
        raise UserError(f"{unseen[0]}; --allow-unseen-data where only the nodes see it, or an earlier job makes it")
    for line in unseen:
        print(f"warning: {line}", file=sys.stderr)
    if args.dry_run:
        print("\n".join(script_of(job, work) for job in jobs), end="")
        return 0
    ids: dict[str, str] = {}
    if args.submit:
        ids = submit(jobs, work, args.after)
    else:
        write(jobs, work)
    if args.json:
        scripts = [{"script": str(script_path(job, work)), "job": ids.get(job.name)} for job in jobs]
        print(json.dumps({"folder": str(work.folder), "jobs": scripts}))
        return 0
    for job in jobs:
        many = f"{len(job.members)} runs of " if job.is_array else ""
        print(f"{script_path(job, work)}: {many}{work.allocation.world} ranks")
        if job.name in ids:
            print(f"  job {ids[job.name]}; `ettin status {ids[job.name]}` follows it")
            if reason := held_for_good(ids[job.name]):
                print(f"warning: SLURM says that it cannot start: {reason}", file=sys.stderr)
    if not ids:
        print("not submitted: look at it, then `sbatch FILE`, or again with --submit")
    return 0


def requested(args: argparse.Namespace) -> tuple[Work, list[Job], list[str]]:
    """The submission, checked as far as that goes here, and lines on data that is not here. Raises UserError."""
    from megatron_ettin.cli.launched import jobs_of, parse_call, unseen_data
    from megatron_ettin.launch.profile import read_profile
    from megatron_ettin.launch.request import Work, allocation_of, margin_of

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words or words[0] not in COMMANDS:
        found = f"found {words[0]!r}{nearest(words[0], COMMANDS)}" if words else "found nothing"
        raise UserError(f"what follows `--` must be train or bench and its options, {found}")
    check_options(args)
    profile = read_profile(args.profile)
    allocation = allocation_of(args, profile)
    sweeps = [*(SUITE if args.suite else ()), *args.sweep]
    call = parse_call(words[0], words[1:], sweeps)
    container = args.container or profile.container
    if args.container and not (profile.container_srun or profile.container_prefix):
        raise UserError("--container: the profile says nothing of containers (container_srun or container_prefix)")
    work = Work(
        folder=(call.base / "slurm").absolute(),
        allocation=allocation,
        profile=profile,
        launcher=args.launcher,
        container=container,
        env_file=args.env_file.absolute() if args.env_file else None,
        restarts=args.restarts,
        requeues=args.requeues,
        margin_seconds=margin_of(args.margin_seconds, allocation.time),
        grace_seconds=args.grace_seconds,
        written_by=shlex.join(["ettin", "launch", *sys.argv[2:]]) if sys.argv[1:2] == ["launch"] else "ettin launch",
        cwd=Path.cwd(),
    )
    return work, jobs_of(call, allocation.world, args.at_once), unseen_data(call)


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for what is out of range or cannot be read."""
    for name, least in (("restarts", 0), ("requeues", 0), ("grace_seconds", 1), ("at_once", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.env_file is not None and not args.env_file.is_file():
        raise UserError(f"--env-file {args.env_file}: no such file")
    if args.after is not None and not args.submit:
        raise UserError("--after: goes with --submit")
