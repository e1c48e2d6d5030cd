"""Parse the `ettin train` or `ettin bench` command of a submission with its own parser, and split it into jobs.

So a mistake is reported before anything is queued.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.parsing import OneLineParser, format_arguments, parse_overrides
from megatron_ettin.cli.phases import PlannedPhase, plan_phases

if TYPE_CHECKING:
    from megatron_ettin.config.overrides import Member
    from megatron_ettin.launch.request import BatchJob

NOT_FOR_JOBS = ("dry_run", "explain", "json", "sweep", "sweep_member")
# written again for each job or each run
REWRITTEN = ("size", "objective", "phase", "run_dir", "init_from", "config")


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
    """Own arguments of each member of the sweep (or of the one run), and its phases in order."""
    user_config: Path | None = None

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1


def parse_command(command: str, arguments: Sequence[str], sweeps: Sequence[str]) -> LaunchedCommand:
    """Parse the command after `--`.

    Args:
        command: train or bench.
        arguments: what follows it.
        sweeps: `KEY=V1,V2` of `ettin launch`.

    Raises:
        UserError: as the command itself would.
    """
    from megatron_ettin.config.overrides import members

    module = importlib.import_module(f"megatron_ettin.cli.{command}")
    parser = OneLineParser(prog=f"ettin {command}")
    module.add_arguments(parser)
    args = parse_overrides(parser, command, arguments)
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
        # so that the rest can be completed; each member has its own
        setattr(args, name, sweep[0].values[name])
    if sweep and args.run_dir is None:
        raise UserError("--run-dir: name the folder that takes the sweep's runs")
    shared = tuple(format_arguments(parser, args, REWRITTEN))
    module.complete(args, is_main_process=True)
    args.run_dir = args.run_dir.absolute()
    runs = [_member_run(args, member) for member in sweep] or [((), tuple(plan_phases(args)))]
    return LaunchedCommand(command, shared, args.run_dir, swept, tuple(runs), args.config)


def _member_run(args: argparse.Namespace, member: Member) -> tuple[tuple[str, ...], tuple[PlannedPhase, ...]]:
    """Return one run of a sweep, in a folder of its own: the arguments it adds, and its phases."""
    chosen = {name: member.values.get(name, getattr(args, name)) for name in ("size", "objective")}
    own = {"run_dir": args.run_dir / member.name, "words": [*args.words, *member.overrides]}
    phases = plan_phases(argparse.Namespace(**{**vars(args), **chosen, **own}))
    names = [argument for name in chosen if name in member.values for argument in (f"--{name}", chosen[name])]
    return (*names, *member.overrides), tuple(phases)


def split_into_jobs(launched: LaunchedCommand, world_size: int, max_parallel: int | None) -> list[BatchJob]:
    """Return a job for each phase, an array where there are several runs.

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
            # each run of an array has a snapshot with its folder's name
            folder = phase.run_dir.relative_to(base).parts[:1] if launched.is_array else ()
            snapshots[".".join([name, *folder, "config.yaml"])] = to_yaml(phase.planned)
        shared, after = _shared_arguments(launched, first), jobs[-1].name if jobs else None
        jobs.append(BatchJob(name, "train", shared, tuple(runs), snapshots, after, max_parallel))
        snapshots = {}
    return jobs


def _shared_arguments(launched: LaunchedCommand, phase: PlannedPhase) -> tuple[str, ...]:
    """Return the arguments that all runs of a job share."""
    run = phase.config.run
    names = {"size": run.size, "objective": run.objective, "phase": run.phase}
    shared = [one for name, value in names.items() if name not in launched.swept for one in (f"--{name}", value)]
    if launched.user_config is not None:
        shared += ["--config", str(launched.base / "slurm" / "site.yaml")]
    return (*shared, *launched.arguments)


def missing_data(launched: LaunchedCommand) -> list[str]:
    """Return a line for each dataset of the runs that does not exist, as seen from here.

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
