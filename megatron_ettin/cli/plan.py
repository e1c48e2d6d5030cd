"""Rank the layouts of a number of GPUs by predicted speed, with memory, the cost of a phase, and the YAML to paste.

Predictions come from a model of a step whose constants are fitted to the published runs of the recipe, or, with
--calibrate, to your own measured runs: JSON lines with size, gpus, tokens_per_second_per_gpu.

Example:
  ettin plan --size 1b --gpus 512 --gpu h100 --phase pretrain
  ettin plan --size 1b --gpus 64 --gpu h100 --phase extend --calibrate runs.jsonl --price 2.5
  ettin plan --size 1b --gpu h100 --scale 8:4096 --picture scaling.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Set

    from megatron_ettin.config.schema import Config
    from megatron_ettin.plan.step_time import StepModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("--size", required=True)
    add("--objective", default="mlm")
    add("--phase", default="pretrain")
    add("--gpus", type=int, above=0, metavar="N", help="number of GPUs")
    add("--gpu", default="h100", metavar="NAME", help="h100, h200, b200, a100, l40s, cpu ...")
    add("--gpus-per-node", type=int, above=0, metavar="N", help="GPUs of a node (default: the usual number)")
    add("--gpus-file", type=Path, metavar="YAML", help="further GPUs, in the format of plan/gpus.yaml")
    add("--chunk-tokens", type=float, above=0, metavar="N", help="mean length of documents in rows")
    add("--calibrate", type=Path, metavar="RUNS.jsonl", help="measured runs to fit the model to")
    add("--price", type=float, above=0, metavar="X", help="price of a GPU hour")
    add("--top", type=int, above=0, default=10, metavar="N", help="layouts shown (%(default)s)")
    add("--scale", metavar="FIRST:LAST", help="or N,N,...: speed, efficiency and goodput on so many GPUs")
    add("--curve", type=Path, metavar="JSON", help="{GPUs: tokens/s of each} measured, for --scale")
    mtbf = "mean time between failures of one GPU, for --scale (%(default)s)"
    add("--mtbf-hours", type=float, above=0, default=50_000.0, help=mtbf)
    add("--checkpoint-seconds", type=float, above=0, default=30.0, help="for --scale (%(default)s)")
    add("--restart-seconds", type=float, above=0, default=300.0, help="for --scale (%(default)s)")
    add("--picture", type=Path, metavar="PNG", help="draw the results of --scale")
    add("--config")
    add("--json")
    add("overrides", help="overrides, as for `ettin train`: any shape, batch, precision")


def run(args: argparse.Namespace) -> None:
    """Print the predicted layouts of a run on --gpus GPUs, or its predicted speed on each of --scale GPUs."""
    from megatron_ettin.config.overrides import given_keys
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.config.tables import PRECISIONS
    from megatron_ettin.plan import calibration, table
    from megatron_ettin.plan.hardware import find_gpu
    from megatron_ettin.plan.search import efficiency, limit_to_relax, nearest_miss, search
    from megatron_ettin.plan.step_time import PUBLISHED, StepModel, usual_chunk_tokens

    gpu = find_gpu(args.gpu, args.gpus_file)
    config = parse(args.size, args.objective, args.phase, args.config, args.overrides)
    if PRECISIONS[config.precision.name].fp8_recipe and not gpu.fp8_tflops:
        name = config.precision.name
        raise UserError(f"precision.name: {name} needs a GPU with FP8, which {gpu.name} has not; use bf16")
    given = given_keys(args.config, args.overrides, args.phase)
    runs = calibration.read_runs(args.calibrate, gpu, args.gpus_file) if args.calibrate else []
    constants = calibration.fit_constants(runs) if runs else PUBLISHED
    errors = calibration.prediction_errors(runs or calibration.published_runs(), constants)
    chunk_tokens = min(args.chunk_tokens or usual_chunk_tokens(config), float(config.data.seq_len))
    model = StepModel(gpu, args.gpus_per_node or gpu.gpus_per_node, chunk_tokens, constants)
    answer: dict[str, Any] = {"gpu": vars(gpu), "constants": vars(constants), "calibration": errors}
    if args.scale:
        print_scaling(args, config, model, given, answer)
        return
    for key in ("curve", "picture"):
        if getattr(args, key):
            raise UserError(f"--{key}: needs --scale; remove it or add --scale FIRST:LAST")
    if args.gpus is None:
        raise UserError("--gpus: missing; give a number of GPUs, or --scale FIRST:LAST")
    layouts, rejected = search(config, args.gpus, model, given)
    if not layouts:
        nearest = nearest_miss(rejected)
        relax = limit_to_relax(nearest.partition(": ")[2], config.parallel, args.gpus)
        raise UserError(f"--gpus {args.gpus}: no valid layout; the nearest: {nearest}{relax}")
    compared = efficiency(layouts[0], config, model, given)
    if not args.json:
        table.print_plan(layouts, rejected, args.top, args.price, errors, compared)
        return
    answer |= {
        "phase": table.phase_cost(layouts[0], args.price),
        "efficiency": None if compared is None else {"over_gpus": compared[0], "share": compared[1]},
        "layouts": [one.to_json() for one in layouts],
        "rejected": [vars(one) for one in rejected],
    }
    print(json.dumps(answer, indent=1))


def print_scaling(
    args: argparse.Namespace, config: Config, model: StepModel, given: Set[str], answer: dict[str, Any]
) -> None:
    """Print the predicted speed on each number of GPUs as a table or JSON, and draw it if `--picture` is given.

    Args:
        args: the options.
        config: the run.
        model: predicts the time of a step.
        given: keys that the user sets.
        answer: the fields that come first in the output of `--json`.
    """
    from megatron_ettin.plan import scaling
    from megatron_ettin.plan.scaling import FailureModel, ScalingCurve
    from megatron_ettin.plan.table import calibration_lines

    if args.gpus is not None:
        raise UserError("--gpus: cannot be used with --scale, which has its own numbers of GPUs; remove one of the two")
    numbers = scaling.parse_gpu_counts(args.scale)
    growth = scaling.read_curve(args.curve) if args.curve else ScalingCurve(8)
    failures = FailureModel(args.mtbf_hours, args.checkpoint_seconds, args.restart_seconds)
    rows = scaling.scaling_rows(config, model, numbers, growth, failures, given)
    if args.price is not None:
        rows = [dataclasses.replace(row, cost=row.gpu_hours * args.price) for row in rows]
    if args.picture:
        try:
            args.picture.write_bytes(scaling.picture(rows, f"{args.size} {args.objective} on {model.gpu.name}"))
        except OSError as error:
            raise UserError(f"--picture {args.picture}: {error.strerror}") from None
    if args.json:
        answer |= {"growth": vars(growth), "failures": vars(failures), "rows": [vars(row) for row in rows]}
        print(json.dumps(answer, indent=1))
    else:
        print("\n".join([scaling.table(rows), *calibration_lines(answer["calibration"])]))
