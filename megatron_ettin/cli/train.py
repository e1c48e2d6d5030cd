"""Train an encoder (mlm) or a decoder (clm) through one phase of the recipe; resumes by itself.

Example:
  ettin train --size 17m --objective mlm --phase pretrain --run-dir runs/17m-mlm data.mixture=corpus run.steps=100
On several devices:
  torchrun --nproc-per-node 8 --no-python ettin train --size 1b --objective clm --phase pretrain parallel.tp=2 ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.config.errors import EXIT_REQUEUE

if TYPE_CHECKING:
    from megatron_ettin.config.schema import Config


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
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="let a science key change")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument(
        "--explain", action="store_true", help="print where the run differs from the original trainer's, and why"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run or --explain: as JSON")
    parser.add_argument(
        "words", nargs="*", metavar="group.key=value", help="overrides, e.g. parallel.tp=2 run.tokens=50B"
    )


CHAIN = ("pretrain", "extend", "decay")  # of --phase all
BEFORE = {"extend": "pretrain", "decay": "extend"}  # what a phase of the recipe goes on from


@dataclass(frozen=True)
class Stage:
    """One phase of a job. `kept`: keys of `model` that come with the weights it begins from."""

    config: Config
    run_dir: Path
    init_from: Path | None
    kept: dict[str, Any]


def weights_model(run_dir: Path, init_from: Path | None) -> dict[str, Any]:
    """Keys of `model` that come with the weights which the run began from: as its first launch recorded them, so that a
    run resumes without them too, or as `init_from` has them. Raises UserError where there are no such weights."""
    from megatron_ettin.config.history import first_launch

    first = first_launch(run_dir)
    if first is not None:
        return dict(first.get("model_of_weights") or {})
    if init_from is None:
        return {}
    from megatron_ettin.config.inherit import inherited

    return inherited(weights_config(init_from))


def weights_config(init_from: Path) -> dict[str, Any]:
    """The groups of the config that lies with weights. Raises UserError where there are none."""
    from megatron_ettin.checkpoint.directory import read_config, resolve
    from megatron_ettin.convert.hf_folder import groups_of, is_hf_folder

    return groups_of(init_from) if is_hf_folder(init_from) else read_config(resolve(init_from))


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """The phases asked for, resolved and checked. Raises UserError."""
    from megatron_ettin.config.inherit import inherited
    from megatron_ettin.config.resolve import parse

    run_dir, words = args.run_dir, args.words
    if args.phase != "all":
        kept = weights_model(run_dir, args.init_from)
        config = parse(args.size, args.objective, args.phase, args.config, words, kept)
        return [Stage(config, run_dir, args.init_from, kept)]
    stages: list[Stage] = []
    for phase in CHAIN:
        own = run_dir / phase
        kept = inherited(dataclasses.asdict(stages[-1].config)) if stages else weights_model(own, args.init_from)
        config = parse(args.size, args.objective, phase, args.config, words, kept)
        stages.append(Stage(config, own, stages[-1].run_dir if stages else args.init_from, kept))
    return stages


def chain_warning(stage: Stage) -> str | None:
    """Where a phase does not go on from the one that the recipe has before it."""
    from megatron_ettin.config.history import first_launch

    phase = stage.config.run.phase
    if phase not in BEFORE or first_launch(stage.run_dir) is not None:
        return None
    if stage.init_from is None:
        return f"warning: {phase} begins from initial weights; the recipe goes on from {BEFORE[phase]} (--init-from)"
    found = (weights_config(stage.init_from).get("run") or {}).get("phase")
    if found in (BEFORE[phase], None):
        return None
    return f"warning: {phase} begins from {found}; the recipe goes on from {BEFORE[phase]}"


def explain(stage: Stage, args: argparse.Namespace) -> str:
    """What `--explain` prints."""
    from megatron_ettin.config.explain import describe, differences, to_json
    from megatron_ettin.config.resolve import origins

    found = differences(stage.config, origins(args.config, args.words, stage.kept, stage.config.run.phase))
    return json.dumps(to_json(found), indent=1) if args.json else describe(found, stage.config)


def complete(args: argparse.Namespace, is_chief: bool) -> None:
    """Fill in what an original trainer's file says and what follows from other options. Raises UserError."""
    from megatron_ettin.config.errors import UserError
    from megatron_ettin.config.layers import names_of, read_site

    site = read_site(args.config) if args.config else None
    named = names_of(site, args.config, {"size": args.size, "objective": args.objective, "phase": args.phase})
    args.size, args.objective, args.phase = named["size"], named["objective"], named["phase"]
    for line in site.told if site and is_chief else ():
        print(line, file=sys.stderr, flush=True)
    if args.recipe:
        args.words = [f"run.recipe={args.recipe}", *args.words]
    suffix = "" if args.phase == "all" else f"-{args.phase}"
    args.run_dir = args.run_dir or Path("runs") / f"{args.size}-{args.objective}{suffix}"
    if args.from_step is not None and args.phase == "all":
        raise UserError("--from-step: is of one phase, not of all")
    if args.from_step is not None and args.from_step < 1:
        raise UserError(f"--from-step {args.from_step}: must be at least 1")


def tell(stages: list[Stage]) -> None:
    """What is worth knowing before the start, on standard error."""
    from megatron_ettin.config.inherit import told
    from megatron_ettin.config.recipe import recipe

    for number, stage in enumerate(stages):
        run = stage.config.run
        if number == 0:
            tables = recipe(run.size, run.objective, run.phase, name=run.recipe).model
            for line in told(stage.kept, tables, stage.config.model):
                print(line, file=sys.stderr, flush=True)
            warning = chain_warning(stage)
            if warning:
                print(warning, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    is_chief = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    complete(args, is_chief)
    stages = stages_of(args)
    if args.explain:
        print("\n".join(explain(stage, args) for stage in stages))
        return 0
    if is_chief:
        tell(stages)
    if args.dry_run:
        from megatron_ettin.plan.dry_run import describe

        print("\n".join(describe(stage.config, as_json=args.json) for stage in stages))
        return 0
    from megatron_ettin.train.chain import run_chain
    from megatron_ettin.train.loop import Launch, TrainingStopped

    if args.init_from is not None:
        from megatron_ettin.convert.hf_folder import import_once, is_hf_folder

        if is_hf_folder(args.init_from):
            stages[0] = dataclasses.replace(
                stages[0], init_from=import_once(args.init_from, stages[0].run_dir, is_chief)
            )
    keep = None if args.init_optimizer is None else args.init_optimizer == "keep"
    launches = [Launch(one.run_dir, one.init_from, keep, args.allow_change, args.from_step, one.kept) for one in stages]
    try:
        unfinished = run_chain(list(zip((stage.config for stage in stages), launches, strict=True)))
    except TrainingStopped as stopped:
        print(f"ettin train: {stopped}", file=sys.stderr, flush=True)
        return 1
    return EXIT_REQUEUE if unfinished else 0
