r"""Train an encoder (mlm) or a decoder (clm) through one phase of the recipe; resumes by itself.

Example:
  ettin train --size 17m --objective mlm --phase pretrain --run-dir runs/17m-mlm data.mixture=data/corpus run.steps=100
On several devices:
  torchrun --nproc-per-node 8 --no-python ettin train --size 1b --objective clm --phase pretrain parallel.tp=2 \
      data.mixture=data/corpus
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_ettin.base.errors import EXIT_FAILURE, EXIT_REQUEUE, UserError
from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.cli.phases import PlannedPhase, chain_warning, plan_phases, reference_rate_line
from megatron_ettin.parallel.env import rank_of_environment
from megatron_ettin.parallel.failure_report import record_failure

if TYPE_CHECKING:
    from megatron_ettin.config.schema import Config
    from megatron_ettin.train.job import TrainArgs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("--size")
    add("--objective", help="mlm (encoder), clm (decoder), mntp, hybrid, hybrid_mntp")
    add("--phase", help="pretrain extend decay cross, or all: the first three, in RUN_DIR/PHASE")
    recipes = "original: the choices of the original trainer (docs/recipe.md)"
    add("--recipe", choices=("paired", "original"), metavar="paired|original", help=recipes)
    user_config = "groups of keys, or a YAML of the original trainer, which brings the three names"
    add("--config", metavar="SITE.yaml", help=user_config)
    add("--run-dir", type=Path, help="default runs/SIZE-OBJECTIVE-PHASE")
    add("--init-from", type=Path, metavar="RUN|CHECKPOINT|HF_DIR", help="weights to begin from")
    add("--init-optimizer", choices=("keep", "fresh"), help="default: keep between phases of one objective")
    from_step = "step of --init-from's run; without --init-from the run itself goes back to it"
    add("--from-step", type=int, at_least=1, metavar="N", help=from_step)
    add("--sweep", help="each value in a run of its own, RUN_DIR/KEY=V")
    add("--sweep-member", type=int, metavar="N", help="only the sweep's run N, from 0 (job arrays)")
    add("--allow-change", action="append", default=[], metavar="KEY", help="let a science key change")
    add("--dry-run", action="store_true", help="print the resolved run and stop")
    add("--explain", action="store_true", help="print where the run differs from the original trainer's, and why")
    add("--json", help="print steps, --dry-run or --explain as JSON")
    add("overrides", metavar="group.key=value", help="overrides, e.g. parallel.tp=2 run.tokens=50B")


def explain(phase: PlannedPhase, args: argparse.Namespace) -> str:
    """Return the text, or with --json the JSON, that `--explain` prints about a phase."""
    from megatron_ettin.config.explain import describe, differences, to_json
    from megatron_ettin.config.resolve import Start, origins

    config, name = phase.planned, phase.config.run.phase
    start = Start(phase.kept, phase.begun)
    different = differences(config, origins(args.config, phase.overrides, name, start))
    return json.dumps(to_json(different, config), indent=1) if args.json else describe(different, config)


def complete(args: argparse.Namespace, is_main_process: bool) -> None:
    """Set size, objective, phase, overrides and run_dir in `args` from the user config and other options.

    Raises:
        UserError: for an option that is missing or does not fit another.
    """
    from megatron_ettin.config.overrides import read_user_config, run_names

    user_config = read_user_config(args.config) if args.config else None
    names = run_names(user_config, args.config, {"size": args.size, "objective": args.objective, "phase": args.phase})
    args.size, args.objective, args.phase = names["size"], names["objective"], names["phase"]
    for line in user_config.notes if user_config and is_main_process else ():
        log_warning(line)
    if args.recipe:
        args.overrides = [f"run.recipe={args.recipe}", *args.overrides]
    suffix = "" if args.phase == "all" else f"-{args.phase}"
    suffix += "-sweep" if args.sweep else ""
    args.run_dir = args.run_dir or Path("runs") / f"{args.size}-{args.objective}{suffix}"
    if args.sweep_member is not None and not args.sweep:
        raise UserError("--sweep-member: needs --sweep")
    if args.from_step is not None and args.phase == "all":
        raise UserError("--from-step: needs one phase, not --phase all")


def log_remarks(phases: list[PlannedPhase], allowed: Sequence[str] = ()) -> None:
    """Print on standard error what a user should know before training starts.

    Args:
        phases: the runs to train.
        allowed: science keys that may change in a run that has begun.
    """
    from megatron_ettin.config.explain import phase_lines
    from megatron_ettin.config.recipe import recipe
    from megatron_ettin.config.resolve import inherited_lines

    # only the first phase: later phases begin from earlier ones, and members of a sweep begin from the same weights
    first = phases[0]
    run = first.config.run
    tables = recipe(run.size, run.objective, run.phase, name=run.recipe).model
    lines = [chain_warning(first), *(map(reference_rate_line, phases) if "optim.lr" in allowed else ())]
    lines += [line for phase in phases for line in remarks(phase)]
    lines += phase_lines(first.overrides, list(dict.fromkeys(phase.config.run.phase for phase in phases)))
    for line in (*inherited_lines(first.kept, tables, first.config.model), *filter(None, lines)):
        log_warning(line)


def unused_overrides(phase: PlannedPhase) -> tuple[str, ...]:
    """Return a line for each override that this run does not read.

    Keys of a user config are not reported, because one file serves the encoder and the decoder of a pair.
    """
    from megatron_ettin.config.explain import ignored_lines
    from megatron_ettin.config.overrides import given_by_user

    return tuple(ignored_lines(phase.config, given_by_user(None, phase.overrides, phase.config.run.phase)))


def remarks(phase: PlannedPhase) -> list[str]:
    """Return lines on unusual row lengths and rates, a fitted schedule, and memory, which the user may not expect."""
    from megatron_ettin.config.recipe import recipe
    from megatron_ettin.config.resolve import rate_line, rows_line
    from megatron_ettin.plan.dry_run import memory_line
    from megatron_ettin.plan.schedule_end import describe_fit, expected_row_tokens

    config, run = phase.config, phase.config.run
    tables = recipe(run.size, run.objective, run.phase, config.data.batching, run.recipe)
    rows = None if "batch.global_batch_rows" in phase.given else rows_line(tables, config)
    fit = describe_fit(config, phase.planned, expected_row_tokens(config.data))
    lines = [rows, rate_line(tables, config), fit, memory_line(config)]
    return [line for line in lines if line is not None]


def run(args: argparse.Namespace) -> int:
    """Explain, print or train the runs that the options ask for, and return the exit status."""
    is_main_process = rank_of_environment() == 0
    complete(args, is_main_process)
    phases = plan_phases(args)
    if args.explain:
        print("\n".join(explain(phase, args) for phase in phases))
        return 0
    if is_main_process:
        log_remarks(phases, args.allow_change)
    if args.dry_run:
        from megatron_ettin.plan.dry_run import describe

        for line in dict.fromkeys(line for phase in phases for line in unused_overrides(phase)):
            log_warning(line)
        print("\n".join(describe(phase.planned, as_json=args.json) for phase in phases))
        return 0
    from megatron_ettin.faults.skipped_steps import TrainingStoppedError
    from megatron_ettin.train.job import prepare_jobs
    from megatron_ettin.train.saving import SaveFailedError
    from megatron_ettin.train.trainer import Trainer

    # steps go to standard output as JSON lines, everything else to standard error
    json_stream = sys.stdout if args.json else None
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        runs, is_sweep = train_runs(args, phases, is_main_process, json_stream), bool(args.sweep)
        try:
            # if all runs of the sweep are done, no jobs are left, and the sweep is only summarised
            jobs = prepare_jobs(runs, is_sweep)
            unfinished = bool(jobs) and Trainer(jobs, is_sweep).run()
        except TrainingStoppedError as stopped:
            # a restart cannot help: the same rows and weights would stop again; a full disk, in contrast, may be mended
            record_failure(stopped, "error" if isinstance(stopped, SaveFailedError) else "stopped")
            log_warning(f"ettin train: {stopped}")
            return EXIT_FAILURE
        if is_sweep and is_main_process:
            from megatron_ettin.config.overrides import members
            from megatron_ettin.report.sweep import summarise

            log_info(summarise(args.run_dir, members(args.sweep)))
    return EXIT_REQUEUE if unfinished else 0


def train_runs(
    args: argparse.Namespace, phases: Sequence[PlannedPhase], is_main_process: bool, json_stream: TextIO | None
) -> list[tuple[Config, TrainArgs]]:
    """Return the configuration and arguments of each run. Weights of a Hugging Face folder are imported first."""
    from megatron_ettin.train.job import TrainArgs

    weights = args.init_from
    if weights is not None:
        from megatron_ettin.convert.from_hf import import_once, is_hf_folder

        if is_hf_folder(weights):
            weights = import_once(weights, args.run_dir, is_main_process)
    keep = None if args.init_optimizer is None else args.init_optimizer == "keep"
    runs = []
    for one in phases:
        init_from = weights if one.init_from == args.init_from else one.init_from
        shared = (keep, args.allow_change, args.from_step, one.kept, json_stream, one.free, unused_overrides(one))
        runs.append((one.config, TrainArgs(one.run_dir, init_from, *shared)))
    return runs
