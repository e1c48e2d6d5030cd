"""Train an encoder (mlm) or a decoder (clm) through one phase of the recipe; resumes by itself.

Example:
  ettin train --size 17m --objective mlm --phase pretrain --run-dir runs/17m-mlm data.mixture=data/corpus run.steps=100
On several devices:
  torchrun --nproc-per-node 8 --no-python ettin train --size 1b --objective clm --phase pretrain parallel.tp=2 \\
      data.mixture=data/corpus
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from megatron_ettin.base.errors import EXIT_REQUEUE
from megatron_ettin.base.log import log_info, log_warning
from megatron_ettin.cli.stages import Stage, chain_warning, reference_rate_line, stages_of
from megatron_ettin.parallel.failure_report import record_failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", help="17m 32m 68m 150m 400m 1b")
    parser.add_argument("--objective", help="mlm (encoder), clm (decoder), mntp, hybrid, hybrid_mntp")
    parser.add_argument("--phase", help="pretrain extend decay cross, or all: the first three, in RUN_DIR/PHASE")
    parser.add_argument(
        "--recipe", metavar="paired|original", help="original: the choices of the original trainer (docs/recipe.md)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="SITE.yaml",
        help="groups of keys, or a YAML of the original trainer, which brings the three names",
    )
    parser.add_argument("--run-dir", type=Path, help="default runs/SIZE-OBJECTIVE-PHASE")
    parser.add_argument("--init-from", type=Path, metavar="RUN|CHECKPOINT|HF_DIR", help="weights to begin from")
    parser.add_argument(
        "--init-optimizer", choices=("keep", "fresh"), help="default: keep between phases of one objective"
    )
    parser.add_argument(
        "--from-step",
        type=int,
        metavar="N",
        help="of --init-from's run; without it, the run itself goes back to it",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="each value in a run of its own, RUN_DIR/KEY=V",
    )
    parser.add_argument("--sweep-member", type=int, metavar="N", help="only the sweep's run N, from 0 (job arrays)")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="let a science key change")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument(
        "--explain", action="store_true", help="print where the run differs from the original trainer's, and why"
    )
    parser.add_argument("--json", action="store_true", help="steps as JSON lines; with --dry-run or --explain: those")
    parser.add_argument(
        "words", nargs="*", metavar="group.key=value", help="overrides, e.g. parallel.tp=2 run.tokens=50B"
    )


def explain(stage: Stage, args: argparse.Namespace) -> str:
    """What `--explain` prints."""
    from megatron_ettin.config.explain import describe, differences, to_json
    from megatron_ettin.config.resolve import origins

    config = stage.planned
    found = differences(config, origins(args.config, stage.words, stage.kept, stage.config.run.phase, stage.begun))
    return json.dumps(to_json(found, config), indent=1) if args.json else describe(found, config)


def complete(args: argparse.Namespace, is_main_process: bool) -> None:
    """Fill in what an original trainer's file says and what follows from other options. Raises UserError."""
    from megatron_ettin.base.errors import UserError
    from megatron_ettin.config.overrides import read_user_config, run_names

    user_config = read_user_config(args.config) if args.config else None
    named = run_names(user_config, args.config, {"size": args.size, "objective": args.objective, "phase": args.phase})
    args.size, args.objective, args.phase = named["size"], named["objective"], named["phase"]
    for line in user_config.notes if user_config and is_main_process else ():
        log_warning(line)
    if args.recipe:
        args.words = [f"run.recipe={args.recipe}", *args.words]
    suffix = "" if args.phase == "all" else f"-{args.phase}"
    suffix += "-sweep" if args.sweep else ""
    args.run_dir = args.run_dir or Path("runs") / f"{args.size}-{args.objective}{suffix}"
    if args.sweep_member is not None and not args.sweep:
        raise UserError("--sweep-member: needs --sweep")
    if args.from_step is not None and args.phase == "all":
        raise UserError("--from-step: is of one phase, not of all")
    if args.from_step is not None and args.from_step < 1:
        raise UserError(f"--from-step {args.from_step}: must be at least 1")


def tell(stages: list[Stage], allowed: Sequence[str] = ()) -> None:
    """Print on standard error what a user should know before training starts.

    Args:
        stages: the runs to train.
        allowed: science keys that may change in a run that has begun.
    """
    from megatron_ettin.config.explain import phase_lines
    from megatron_ettin.config.recipe import recipe
    from megatron_ettin.config.resolve import inherited_lines

    first = stages[0]  # later phases begin from earlier ones, members of a sweep all from the same
    run = first.config.run
    tables = recipe(run.size, run.objective, run.phase, name=run.recipe).model
    about = [chain_warning(first), *(map(reference_rate_line, stages) if "optim.lr" in allowed else ())]
    about += [line for stage in stages for line in remarks(stage)]
    about += phase_lines(first.words, list(dict.fromkeys(stage.config.run.phase for stage in stages)))
    for line in (*inherited_lines(first.kept, tables, first.config.model), *filter(None, about)):
        log_warning(line)


def unread_keys(stage: Stage) -> tuple[str, ...]:
    """Return a line for each override that this run does not read; a file is left out, for one serves both halves."""
    from megatron_ettin.config.explain import ignored_lines
    from megatron_ettin.config.resolve import given_by_user

    return tuple(ignored_lines(stage.config, given_by_user(None, stage.words, stage.config.run.phase)))


def remarks(stage: Stage) -> list[str]:
    """Return a line for each thing about the run that its user may not have meant."""
    from megatron_ettin.config.recipe import recipe
    from megatron_ettin.config.resolve import rate_line, rows_line
    from megatron_ettin.plan.dry_run import memory_line
    from megatron_ettin.plan.schedule_end import describe_fit, expected_row_tokens

    config, run = stage.config, stage.config.run
    tables = recipe(run.size, run.objective, run.phase, config.data.batching, run.recipe)
    rows = None if "batch.global_batch_rows" in stage.given else rows_line(tables, config)
    fit = describe_fit(config, stage.planned, expected_row_tokens(config))
    lines = [rows, rate_line(tables, config), fit, memory_line(config)]
    return [line for line in lines if line is not None]


def run(args: argparse.Namespace) -> int:
    is_main_process = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    complete(args, is_main_process)
    stages = stages_of(args)
    if args.explain:
        print("\n".join(explain(stage, args) for stage in stages))
        return 0
    if is_main_process:
        tell(stages, args.allow_change)
    if args.dry_run:
        from megatron_ettin.plan.dry_run import describe

        for line in dict.fromkeys(line for stage in stages for line in unread_keys(stage)):
            log_warning(line)
        print("\n".join(describe(stage.planned, as_json=args.json) for stage in stages))
        return 0
    with told_to(args.json) as json_stream:
        return trained(args, stages, is_main_process, json_stream)


@contextlib.contextmanager
def told_to(as_json: bool) -> Iterator[TextIO | None]:
    """Where steps go as JSON lines: to standard output, and what else is told to standard error."""
    if not as_json:
        yield None
        return
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield lines


def trained(args: argparse.Namespace, stages: list[Stage], is_main_process: bool, json_stream: TextIO | None) -> int:
    """Train through the stages; the exit status."""
    if stages[0].config.resilience.in_process_restarts:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or torch tells of every look into the library's store
    from megatron_ettin.faults.in_process_restart import with_restarts
    from megatron_ettin.train.chain import run_chain, run_sweep
    from megatron_ettin.train.saving import SaveFailed
    from megatron_ettin.train.trainer import TrainArgs, TrainingStopped

    if args.init_from is not None:
        from megatron_ettin.convert.from_hf import import_once, is_hf_folder

        if is_hf_folder(args.init_from):
            imported = import_once(args.init_from, args.run_dir, is_main_process)
            here = {args.init_from: imported}
            stages = [dataclasses.replace(one, init_from=here.get(one.init_from, one.init_from)) for one in stages]
    keep = None if args.init_optimizer is None else args.init_optimizer == "keep"
    launches = [
        TrainArgs(
            one.run_dir,
            one.init_from,
            keep,
            args.allow_change,
            args.from_step,
            one.kept,
            json_stream,
            one.free,
            unread_keys(one),
        )
        for one in stages
    ]
    try:
        pairs = list(zip((stage.config for stage in stages), launches, strict=True))
        settings, device = stages[0].config.resilience, stages[0].config.run.device
        unfinished = with_restarts(settings, device, lambda: run_sweep(pairs) if args.sweep else run_chain(pairs))
    except TrainingStopped as stopped:
        # the same rows and weights would end the same way; a disk that is full may not be tomorrow
        record_failure(stopped, "error" if isinstance(stopped, SaveFailed) else "stopped")
        log_warning(f"ettin train: {stopped}")
        return 1
    if args.sweep and is_main_process:
        from megatron_ettin.config.overrides import members
        from megatron_ettin.report.sweep import summarise

        log_info(summarise(args.run_dir, members(args.sweep)))
    return EXIT_REQUEUE if unfinished else 0
