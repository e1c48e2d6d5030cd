"""The call of `ettin train` or `ettin bench` that `ettin launch` puts into scripts: parsed by the command's own parser,
so that a mistake is told before anything is queued, and taken apart into jobs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError
from megatron_ettin.cli.parsing import OneLineParser, overrides_of, parse_overrides
from megatron_ettin.cli.stages import Stage, stages_of

if TYPE_CHECKING:
    from megatron_ettin.config.overrides import Member
    from megatron_ettin.launch.request import Job

NOT_FOR_JOBS = ("dry_run", "explain", "json", "sweep", "sweep_member")


# said for each job or each run, not as they were written
SAID_ANEW = ("size", "objective", "phase", "run_dir", "init_from", "config")


@dataclass(frozen=True)
class Call:
    """`words`: those that all jobs share. `swept`: of size and objective, what differs between the runs. `runs`: of
    each member of the sweep (or the one run) its own words, and its phases in order."""

    command: str
    words: tuple[str, ...]
    base: Path
    swept: frozenset[str] = frozenset()
    runs: tuple[tuple[tuple[str, ...], tuple[Stage, ...]], ...] = ()
    site: Path | None = None

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1


def parse_call(command: str, words: Sequence[str], sweeps: Sequence[str]) -> Call:
    """Raises UserError as the command itself would."""
    from megatron_ettin.config.overrides import members

    module = importlib.import_module(f"megatron_ettin.cli.{command}")
    parser = OneLineParser(prog=f"ettin {command}")
    module.add_arguments(parser)
    args = parse_overrides(parser, command, words)
    if command == "bench":
        return _bench_call(args, words, sweeps)
    for name in NOT_FOR_JOBS:
        if getattr(args, name) not in (None, False, []):
            raise UserError(f"--{name.replace('_', '-')}: not of a job; give it to `ettin launch`, or leave it out")
    found = members(sweeps) if sweeps else []
    swept = frozenset(found[0].values) & {"size", "objective"} if found else frozenset()
    for name in sorted(swept):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: the sweep says it; leave it out of what follows `--`")
        setattr(args, name, found[0].values[name])  # so that the rest can be completed; each member has its own
    if found and args.run_dir is None:
        raise UserError("--run-dir: name the folder that takes the sweep's runs")
    shared = tuple(overrides_of(parser, args, SAID_ANEW))
    module.complete(args, is_main_process=True)
    args.run_dir = args.run_dir.absolute()
    runs = [_member_run(args, member) for member in found] or [((), tuple(stages_of(args)))]
    return Call(command, shared, args.run_dir, swept, tuple(runs), args.config)


def _member_run(args: argparse.Namespace, member: Member) -> tuple[tuple[str, ...], tuple[Stage, ...]]:
    """One run of a sweep, in a folder of its own: the words it adds, and its phases."""
    chosen = {name: member.values.get(name, getattr(args, name)) for name in ("size", "objective")}
    own = {"run_dir": args.run_dir / member.name, "words": [*args.words, *member.overrides]}
    stages = stages_of(argparse.Namespace(**{**vars(args), **chosen, **own}))
    named = [word for name in chosen if name in member.values for word in (f"--{name}", chosen[name])]
    return (*named, *member.overrides), tuple(stages)


def _bench_call(args: argparse.Namespace, words: Sequence[str], sweeps: Sequence[str]) -> Call:
    if sweeps:
        raise UserError("--sweep, --suite: of runs; bench has its own --sweep, to write after `--`")
    return Call("bench", tuple(words), args.out.absolute().with_suffix(""))  # beside the results


def jobs_of(call: Call, world: int, at_once: int | None) -> list[Job]:
    """A job for each phase; an array of them where there are several runs. Raises UserError for a layout that `world`
    ranks cannot have."""
    from megatron_ettin.config.layouts import check_layout
    from megatron_ettin.config.resolve import to_yaml
    from megatron_ettin.launch.request import Job, Member

    if call.command == "bench":
        return [Job("bench", "bench", call.words, (Member(call.base),))]
    snapshots = {} if call.site is None else {"site.yaml": call.site.read_text(encoding="utf-8")}
    jobs: list[Job] = []
    for number, first in enumerate(call.runs[0][1]):
        members, name = [], _job_name(call, first)
        for own, stages in call.runs:
            stage = stages[number]
            check_layout(stage.config, world)
            begin = () if stage.init_from is None else ("--init-from", str(stage.init_from.absolute()))
            members.append(Member(stage.run_dir, (*own, *begin)))
            snapshots[_snapshot_name(call, name, stage)] = to_yaml(stage.planned)
        after = jobs[-1].name if jobs else None
        jobs.append(Job(name, "train", _shared_words(call, first), tuple(members), snapshots, after, at_once))
        snapshots = {}
    return jobs


def _job_name(call: Call, stage: Stage) -> str:
    run = stage.config.run
    return f"{call.base.name}-{run.phase}" if call.is_array else f"{run.size}-{run.objective}-{run.phase}"


def _snapshot_name(call: Call, job: str, stage: Stage) -> str:
    """Of an array's runs each has a folder's name of its own."""
    folder = stage.run_dir.relative_to(call.base).parts[:1] if call.is_array else ()
    return ".".join([job, *folder, "config.yaml"])


def _shared_words(call: Call, stage: Stage) -> tuple[str, ...]:
    """What each run of a job says alike."""
    run = stage.config.run
    named = {"size": run.size, "objective": run.objective, "phase": run.phase}
    words = [word for name, value in named.items() if name not in call.swept for word in (f"--{name}", value)]
    if call.site is not None:
        words += ["--config", str(call.base / "slurm" / "site.yaml")]
    return (*words, *call.words)


def unseen_data(call: Call) -> list[str]:
    """Return a line for each dataset of the runs that is not there, as seen from here.

    Raises:
        UserError: for a dataset that is there and cannot be that of its run.
    """
    from megatron_ettin.config.values import validation_sets
    from megatron_ettin.data.manifest import FILE_NAME, read_manifest
    from megatron_ettin.data.mixture import parse_mixture, resolve_mixture

    lines: dict[str, None] = {}
    for config in (stage.config for _, stages in call.runs for stage in stages):
        data, vocabulary = resolve_mixture(config.data), config.model.vocab_size
        asked = [("data.mixture", entry.path) for entry in parse_mixture(data.mixture)]
        held_out = validation_sets(data.validation) if data.validation is not None else {}
        asked += [("data.validation", path) for path in held_out.values()]
        for key, path in asked:
            if not (Path(path) / FILE_NAME).exists():
                lines[f"{key}: {path}: no dataset is there"] = None
                continue
            entries = read_manifest(Path(path)).tokenizer.vocab_size
            if entries != vocabulary:
                raise UserError(
                    f"{key}: {path} was made with a tokenizer of {entries:,} entries, and model.vocab_size is"
                    f" {vocabulary:,}; set model.vocab_size={entries} or prepare the data with the model's tokenizer"
                )
        if data.order != "keyed" and not Path(data.order).exists():
            lines[f"data.order: {data.order}: no such file"] = None
    return list(lines)
