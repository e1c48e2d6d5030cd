r"""Write the sbatch script of a run, or of many, and submit it.

Examples:
  ettin launch --nodes 8 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00 --partition gpu --submit -- \
      train --size 1b --objective mlm --phase pretrain --run-dir runs/1b-mlm data.mixture=data/corpus
  ettin launch --suite --nodes 4 --gpus-per-node 8 --cpus-per-task 12 --profile site.yaml --submit -- \
      train --phase all --run-dir runs/suite data.mixture=data/corpus          # 6 sizes x 2 objectives x 3 phases
After `--` comes an `ettin train` or `ettin bench` command. With --phase all each phase is a job that waits for the
one before; --sweep and --suite make arrays. docs/slurm.md describes what a job does when it is preempted or fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.cli.parsing import OneLineParser, format_arguments, parse_arguments
from megatron_ettin.cli.phases import PlannedPhase, member_phases, plan_phases

if TYPE_CHECKING:
    from megatron_ettin.launch.request import BatchJob, Submission

COMMANDS = ("train", "bench")
SUITE = ("size=17m,32m,68m,150m,400m,1b", "objective=mlm,clm")
NOT_FOR_JOBS = ("dry_run", "explain", "json", "sweep", "sweep_member")
# options that are written anew for each job or each run
REWRITTEN = ("size", "objective", "phase", "run_dir", "init_from", "config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
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
    add("--sweep", help="an array with a run for each value")
    add("--suite", action="store_true", help="an array of the 6 sizes x 2 objectives")
    add("--at-once", type=int, at_least=1, metavar="N", help="most runs of an array at the same time")
    failures = "most failures in a row without a new checkpoint (%(default)s)"
    add("--restarts", type=int, at_least=0, default=3, help=failures)
    add("--requeues", type=int, at_least=0, default=200, help="most requeues of each job (%(default)s)")
    add("--margin-seconds", type=int, help="save so long before the time limit: 300, or a quarter of the limit")
    grace = "for the other ranks to end, once one has (%(default)s)"
    add("--grace-seconds", type=int, at_least=1, default=30, help=grace)
    add("--allow-unseen-data", action="store_true", help="allow data that only the nodes see, or that is made later")
    add("--submit", action="store_true", help="submit with sbatch; without it the script is only written")
    add("--dry-run", action="store_true", help="print the script and write nothing")
    add("--json", help="print folder, scripts and job ids as JSON")
    add("command", nargs=argparse.REMAINDER, metavar="-- train ...")


def run(args: argparse.Namespace) -> int:
    """Write the scripts, submit them with --submit, print what was done, and return 0."""
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
    """Build the submission and check it as far as is possible on this machine.

    Returns:
        The settings that its jobs share, the jobs, and a line for each dataset that this machine does not see.

    Raises:
        UserError: for a mistake of the command line, the profile or the command after `--`.
    """
    from megatron_ettin.launch.request import Submission, build_allocation, read_profile, resolve_margin

    call = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not call or call[0] not in COMMANDS:
        given = f"found {call[0]!r}{nearest(call[0], COMMANDS)}" if call else "found nothing"
        raise UserError(f"what follows `--` must be train or bench and its options, {given}")
    check_options(args)
    profile = read_profile(args.profile)
    allocation = build_allocation(args, profile)
    launched = parse_command(call[0], call[1:], [*(SUITE if args.suite else ()), *args.sweep])
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
    """Raise UserError for a file that does not exist, or an option that needs another one."""
    if args.env_file is not None and not args.env_file.is_file():
        raise UserError(f"--env-file {args.env_file}: no such file")
    if args.after is not None and not args.submit:
        raise UserError("--after: needs --submit")


@dataclass(frozen=True)
class LaunchedCommand:
    """The command after `--`, parsed."""

    command: str
    """train or bench."""
    arguments: tuple[str, ...]
    """Arguments that all jobs share."""
    base: Path
    """The run directory, the folder of a sweep's runs, or where bench writes its results."""
    swept: frozenset[str] = frozenset()
    """Options among size and objective that differ between the runs."""
    runs: tuple[tuple[tuple[str, ...], tuple[PlannedPhase, ...]], ...] = ()
    """For each member of the sweep, or for the only run: the arguments of its own, and its phases in order."""
    user_config: Path | None = None

    @property
    def is_array(self) -> bool:
        """Return whether each phase is a job array, because there are several runs."""
        return len(self.runs) > 1


def parse_command(command: str, arguments: Sequence[str], sweeps: Sequence[str]) -> LaunchedCommand:
    """Parse the command after `--` by its own parser, so that a mistake is reported before anything is queued.

    Args:
        command: train or bench.
        arguments: the words after it.
        sweeps: `KEY=V1,V2` of the --sweep and --suite of `ettin launch`.

    Raises:
        UserError: for a mistake that the command would report, or an option that a job cannot have.
    """
    from megatron_ettin.config.overrides import members

    module = importlib.import_module(f"megatron_ettin.cli.{command}")
    parser = OneLineParser(prog=f"ettin {command}")
    module.add_arguments(parser)
    args = parse_arguments(parser, command, arguments)
    if command == "bench":
        if sweeps:
            raise UserError("--sweep, --suite: are for train; bench has its own --sweep, to write after `--`")
        # scripts go into a folder next to the results
        return LaunchedCommand("bench", tuple(arguments), args.out.absolute().with_suffix(""))
    for name in NOT_FOR_JOBS:
        if getattr(args, name) not in (None, False, []):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: not possible in a job; give it to `ettin launch`, or leave it out")
    sweep = members(sweeps) if sweeps else []
    swept = frozenset(sweep[0].values) & {"size", "objective"} if sweep else frozenset()
    for name in sorted(swept):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: the sweep sets it; leave it out of what follows `--`")
        # `complete` needs a value; each member of the sweep then sets its own
        setattr(args, name, sweep[0].values[name])
    if sweep and args.run_dir is None:
        raise UserError("--run-dir: name the folder that takes the sweep's runs")
    shared = tuple(format_arguments(parser, args, REWRITTEN))
    module.complete(args, is_main_process=True)
    args.run_dir = args.run_dir.absolute()
    runs: list[tuple[tuple[str, ...], tuple[PlannedPhase, ...]]] = [] if sweep else [((), tuple(plan_phases(args)))]
    for member in sweep:
        names = [one for name in sorted(swept, reverse=True) for one in (f"--{name}", member.values[name])]
        runs.append(((*names, *member.overrides), tuple(member_phases(args, member))))
    return LaunchedCommand(command, shared, args.run_dir, swept, tuple(runs), args.config)


def split_into_jobs(launched: LaunchedCommand, world_size: int, max_parallel: int | None) -> list[BatchJob]:
    """Return a job for each phase, which is an array if there are several runs.

    Args:
        launched: the parsed command.
        world_size: ranks of each run.
        max_parallel: most runs of an array at the same time; None for no limit.

    Raises:
        UserError: for a layout that `world_size` ranks cannot have.
    """
    from megatron_ettin.config.layouts import check_layout
    from megatron_ettin.config.resolve import to_yaml
    from megatron_ettin.launch.request import BatchJob, JobRun

    base, user_config = launched.base, launched.user_config
    if launched.command == "bench":
        return [BatchJob("bench", "bench", launched.arguments, (JobRun(base),))]
    snapshots = {} if user_config is None else {"site.yaml": user_config.read_text(encoding="utf-8")}
    jobs: list[BatchJob] = []
    for number, first in enumerate(launched.runs[0][1]):
        names = first.config.run
        name = f"{names.size}-{names.objective}-{names.phase}"
        if launched.is_array:
            name = f"{base.name}-{names.phase}"
        runs = []
        for own, phases in launched.runs:
            phase = phases[number]
            check_layout(phase.config, world_size)
            weights = () if phase.init_from is None else ("--init-from", str(phase.init_from.absolute()))
            runs.append(JobRun(phase.run_dir, (*own, *weights)))
            # the snapshots of an array's runs differ by the name of the run's folder
            folder = phase.run_dir.relative_to(base).parts[:1] if launched.is_array else ()
            snapshots[".".join([name, *folder, "config.yaml"])] = to_yaml(phase.planned)
        own_names = {"size": names.size, "objective": names.objective, "phase": names.phase}
        shared = [one for key, value in own_names.items() if key not in launched.swept for one in (f"--{key}", value)]
        shared += [] if user_config is None else ["--config", str(base / "slurm" / "site.yaml")]
        after, shared = jobs[-1].name if jobs else None, [*shared, *launched.arguments]
        jobs.append(BatchJob(name, "train", tuple(shared), tuple(runs), snapshots, after, max_parallel))
        snapshots = {}
    return jobs


def missing_data(launched: LaunchedCommand) -> list[str]:
    """Return a line for each dataset, or recorded order, of the runs that this machine does not see.

    Raises:
        UserError: for a dataset that exists and does not fit its run.
    """
    from megatron_ettin.config.values import validation_sets
    from megatron_ettin.data.manifest import FILE_NAME, read_manifest
    from megatron_ettin.data.mixture import parse_mixture, resolve_mixture

    lines: dict[str, None] = {}
    for config in (phase.config for _, phases in launched.runs for phase in phases):
        data, vocabulary = resolve_mixture(config.data), config.model.vocab_size
        datasets = [("data.mixture", entry.path) for entry in parse_mixture(data.mixture)]
        held_out = validation_sets(data.validation) if data.validation is not None else {}
        datasets += [("data.validation", path) for path in held_out.values()]
        for key, path in datasets:
            if not (Path(path) / FILE_NAME).exists():
                lines[f"{key}: {path}: no dataset exists there"] = None
                continue
            entries = read_manifest(Path(path)).tokenizer.vocab_size
            if entries != vocabulary:
                raise UserError(
                    f"{key}: {path} was made with a tokenizer of {entries:,} entries, but model.vocab_size is"
                    f" {vocabulary:,}; set model.vocab_size={entries} or prepare the data with the model's tokenizer"
                )
        if data.order != "keyed" and not Path(data.order).exists():
            lines[f"data.order: {data.order}: no such file"] = None
    return list(lines)
