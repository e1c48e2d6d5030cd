"""Train an encoder (mlm) or a decoder (clm) through one phase of the recipe; resumes by itself.

Example:
  ettin train --size 17m --objective mlm --phase pretrain --run-dir runs/17m-mlm data.mixture=corpus run.steps=100
On several devices:
  torchrun --nproc-per-node 8 --no-python ettin train --size 1b --objective clm --phase pretrain parallel.tp=2 ...
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.config.errors import EXIT_REQUEUE

if TYPE_CHECKING:
    from megatron_ettin.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", help="17m 32m 68m 150m 400m 1b")
    parser.add_argument("--objective", help="mlm (encoder), clm (decoder), mntp, hybrid, hybrid_mntp")
    parser.add_argument("--phase", help="pretrain extend decay cross")
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
    parser.add_argument("--init-from", type=Path, metavar="RUN_OR_CHECKPOINT", help="weights of another run")
    parser.add_argument(
        "--init-optimizer", choices=("keep", "fresh"), help="default: keep between phases of one objective"
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


def weights_model(run_dir: Path, init_from: Path | None) -> dict[str, Any]:
    """Keys of `model` that come with the weights which the run began from: as its first launch recorded them, so that a
    run resumes without them too, or as `init_from` has them. Raises UserError where there are no such weights."""
    from megatron_ettin.config.history import first_launch

    first = first_launch(run_dir)
    if first is not None:
        return dict(first.get("model_of_weights") or {})
    if init_from is None:
        return {}
    from megatron_ettin.checkpoint.directory import read_config, resolve
    from megatron_ettin.config.inherit import inherited

    return inherited(read_config(resolve(init_from)))


def explain(config: Config, args: argparse.Namespace, words: list[str], kept: dict[str, Any]) -> str:
    """What `--explain` prints."""
    from megatron_ettin.config.explain import describe, differences, to_json
    from megatron_ettin.config.resolve import origins

    found = differences(config, origins(args.config, words, kept, config.run.phase))
    return json.dumps(to_json(found), indent=1) if args.json else describe(found, config)


def run(args: argparse.Namespace) -> int:
    from megatron_ettin.config.inherit import told
    from megatron_ettin.config.layers import names_of, read_site
    from megatron_ettin.config.recipe import recipe
    from megatron_ettin.config.resolve import parse

    site = read_site(args.config) if args.config else None
    named = names_of(site, args.config, {"size": args.size, "objective": args.objective, "phase": args.phase})
    args.size, args.objective, args.phase = named["size"], named["objective"], named["phase"]
    is_chief = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    for line in site.told if site and is_chief else ():
        print(line, file=sys.stderr, flush=True)
    run_dir = args.run_dir or Path("runs") / f"{args.size}-{args.objective}-{args.phase}"
    kept = weights_model(run_dir, args.init_from)
    words = [*([f"run.recipe={args.recipe}"] if args.recipe else []), *args.words]
    config = parse(args.size, args.objective, args.phase, args.config, words, kept)
    if args.explain:
        print(explain(config, args, words, kept))
        return 0
    if kept and is_chief:
        tables = recipe(args.size, args.objective, args.phase, name=config.run.recipe).model
        for line in told(kept, tables, config.model):
            print(line, file=sys.stderr, flush=True)
    if args.dry_run:
        from megatron_ettin.plan.dry_run import describe

        print(describe(config, as_json=args.json))
        return 0
    from megatron_ettin.train.loop import Launch, TrainingStopped, run_training

    keep = None if args.init_optimizer is None else args.init_optimizer == "keep"
    try:
        unfinished = run_training(config, Launch(run_dir, args.init_from, keep, args.allow_change, kept))
    except TrainingStopped as stopped:
        print(f"ettin train: {stopped}", file=sys.stderr, flush=True)
        return 1
    return EXIT_REQUEUE if unfinished else 0
