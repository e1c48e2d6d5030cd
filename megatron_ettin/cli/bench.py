"""Measure how fast a run trains here: tokens/s, TFLOP/s, MFU, memory, where a step's time goes. No weights are kept.

Each combination of --layouts, --precision and --sweep is measured in turn and appended to --out as a line of JSON. The
same command again measures the combinations that are missing. Rows are synthetic, with documents' lengths, unless
--data names a dataset.

Example:
  ettin bench --size 150m --precision bf16,fp8-current --sweep batch.micro_batch_rows=16,32,64
  torchrun --nproc-per-node 8 --no-python ettin bench --size 1b --objective clm --layouts dp,tp2sp,pp2 --picture 1b.png
  ettin bench --compare before.jsonl after.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import RankError, UserError
from megatron_ettin.base.log import errors_on_terminal, log_info

if TYPE_CHECKING:
    from megatron_ettin.config.overrides import Member
    from megatron_ettin.config.schema import Config
    from megatron_ettin.parallel.env import DistributedEnv
    from megatron_ettin.platform import Platform

USUAL = {"micro_batches": 4, "steps": 8, "warm_up": 3}
QUICK = {"micro_batches": 2, "steps": 3, "warm_up": 1}
QUICK_ROWS = 2
# timeout in seconds of the gather after a measurement that failed
MEETING_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("--size")
    add("--objective", default="mlm")
    add("--phase", default="pretrain")
    add("--config")
    add("--data", metavar="DATASET", help="time the rows of a dataset")
    add("--chunk-tokens", type=float, above=0, default=615.4, help="mean of synthetic documents (%(default)s)")
    add("--micro-batches", type=int, above=0, help="micro-batches of each rank in a step (4)")
    add("--warm-up", type=int, at_least=0, metavar="STEPS", help="steps that are not counted (3)")
    add("--steps", type=int, above=0, help="steps that are counted (8)")
    add("--quick", action="store_true", help="two micro-batches of two rows, three steps after one")
    add("--layouts", metavar="L1,L2", help="such as dp,tp2,tp2sp,tp2pp2 (sp: sequence parallelism)")
    add("--precision", metavar="P1,P2", help="such as bf16,fp8-current: --sweep precision.name=...")
    add("--sweep", help="measure each value")
    add("--out", type=Path, default=Path("bench.jsonl"), help="file of results (%(default)s)")
    add("--again", action="store_true", help="measure also what --out has already")
    add("--picture", type=Path, metavar="PNG", help="draw the results")
    compare = "list what changed beyond the noise"
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help=compare)
    add("--json", help="print the results, or the comparison, as JSON")
    add("overrides")


def run(args: argparse.Namespace) -> None:
    """Measure the combinations, or compare two files of results, and print the results."""
    from megatron_ettin.base.progress import items_report
    from megatron_ettin.bench import results
    from megatron_ettin.config.overrides import given, read_layers
    from megatron_ettin.parallel.collectives import run_on_rank_zero
    from megatron_ettin.parallel.env import read_distributed_env
    from megatron_ettin.parallel.process_groups import release_store, temporary_process_group
    from megatron_ettin.platform import detect

    if args.compare:
        moved = results.compare(*args.compare)
        print(json.dumps(moved, indent=1) if args.json else results.comparison_table(moved))
        return
    set_defaults(args)
    combinations = results.combinations(args.layouts, args.precision, args.sweep)
    if args.size is None and "size" not in combinations[0].values:
        raise UserError("--size: missing; give a size, or sweep it with --sweep size=...")
    env = read_distributed_env()
    device = given(read_layers(args.config, args.overrides, args.phase), "runtime", "device")
    platform = detect(device or "auto", env.local_rank)
    rows, is_only = [], len(combinations) == 1
    # a log has a line for each result, so it needs no progress
    draws = env.rank == 0 and errors_on_terminal()
    try:
        # only rank 0 reads: a later rank would also read the combination that rank 0 has begun meanwhile
        with temporary_process_group(env, platform):
            known = run_on_rank_zero(lambda: known_results(args), UserError)
        with items_report("bench") if draws else contextlib.nullcontext(lambda *_: None) as report:
            for number, member in enumerate(combinations):
                report(number, len(combinations), " ".join(member.overrides))
                rows.append(measure_one(args, member, env, platform, known, is_only))
    finally:
        release_store()
    first = rows[0]
    if all(row["state"] == results.INVALID for row in rows):
        raise UserError(f"none of {len(rows)} combinations is valid; {results.name_of(first)}: {first['reason']}")
    if env.rank > 0:
        return
    print(json.dumps(rows, indent=1) if args.json else "\n".join([results.table(rows), *results.detail_lines(rows)]))
    if args.picture and any(row["state"] == results.DONE for row in rows):
        from megatron_ettin.bench.picture import draw

        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_bytes(draw(rows))


def set_defaults(args: argparse.Namespace) -> None:
    """Set --micro-batches, --steps and --warm-up in `args` if they were not given."""
    for name, number in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, number)


def known_results(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results in --out by identity. Raises UserError if the file holds others or cannot be written."""
    from megatron_ettin.bench import results

    results.check_writable(args.out, "--out")
    if args.picture:
        results.check_writable(args.picture, "--picture")
    return results.read(args.out)


def measure_one(
    args: argparse.Namespace,
    member: Member,
    env: DistributedEnv,
    platform: Platform,
    known: dict[str, Any],
    is_only: bool,
) -> dict[str, Any]:
    """Measure one combination, or return its known result. Every rank returns the same.

    Raises:
        UserError: the combination is not valid, and it is the only one.
    """
    from megatron_ettin.bench import results
    from megatron_ettin.bench.measure import measure
    from megatron_ettin.bench.synthetic import attended_chunk_tokens
    from megatron_ettin.config.layouts import check_layout
    from megatron_ettin.plan.memory import estimate

    row = identity(args, member, env, platform)
    last = known.get(results.identity_key(row))
    if not args.again and last is not None and not results.should_measure(last, is_only):
        return results.known_result(last)
    has_begun = False

    def keep(state: dict[str, Any]) -> dict[str, Any]:
        if env.rank == 0:
            results.append(args.out, row | state)
            if state["state"] == results.DONE:
                line = f"{results.name_of(row)}: {state['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU"
                log_info(line, stream=sys.stderr if args.json else None)
        return row | state

    try:
        config, dataset = resolve(args, row["size"], row["objective"], row["words"], env.world)
        has_begun = bool(keep({"state": results.BEGAN}))
        figures = measure(config, dataset, env, platform, args.warm_up, args.steps)
    except UserError as error:
        if not is_only or has_begun:
            row = keep({"state": results.INVALID, "reason": str(error)})
        if is_only:
            raise
        return row
    except (Exception, KeyboardInterrupt) as error:
        state, met = after_failure(env, platform, results.failure(error))
        kept = keep(state)
        if kept["state"] != results.NO_MEMORY or not met:
            # other ranks wait in a collective, so the job ends; the next start continues after this combination
            raise
        return kept
    shown = {
        "predicted_memory_bytes": estimate(config, check_layout(config, env.world), platform.is_gpu).total_bytes,
        "seq_len": config.data.seq_len,
        "attended_chunk_tokens": attended_chunk_tokens(dataset),
        "precision": config.precision.name,
        "micro_batch_rows": config.batch.micro_batch_rows,
        "global_batch_rows": config.batch.global_batch_rows,
    }
    return keep({"state": results.DONE, **shown, **figures})


def after_failure(env: DistributedEnv, platform: Platform, own: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Agree on the state of a measurement that failed on this rank.

    Returns:
        (state, met). The state is out of memory if that happened on any rank, else this rank's own. `met` is whether
        all ranks arrived and can continue together: a rank that hangs in a collective does not arrive.
    """
    from megatron_ettin.bench import results
    from megatron_ettin.parallel.collectives import all_gather_object
    from megatron_ettin.parallel.process_groups import temporary_process_group

    if own["state"] == results.STOPPED:
        return own, False
    try:
        with temporary_process_group(env, platform, MEETING_SECONDS):
            states = all_gather_object(own)
    except RankError:
        return own, False
    full = [(rank, state) for rank, state in enumerate(states) if state["state"] == results.NO_MEMORY]
    if not full or env.world == 1:
        return own, True
    rank, state = full[0]
    return state | {"reason": f"rank {rank}: {state['reason']}"}, True


def identity(args: argparse.Namespace, member: Member, env: DistributedEnv, platform: Platform) -> dict[str, Any]:
    """Return the fields of a result that identify the measurement (`results.IDENTITY_KEYS`)."""
    size, objective = member.values.get("size", args.size), member.values.get("objective", args.objective)
    row: dict[str, Any] = {"size": size, "objective": objective, "phase": args.phase, "gpus": env.world}
    row |= {"words": [*args.overrides, *member.overrides], "device": platform.name}
    row |= {"config": str(args.config) if args.config else None, "data": args.data}
    row |= {"chunk_tokens": None if args.data else args.chunk_tokens}
    return row | {"micro_batches": args.micro_batches, "quick": args.quick}


def resolve(
    args: argparse.Namespace, size: str, objective: str, overrides: list[str], world: int
) -> tuple[Config, Any]:
    """Return the run to time, with a batch of `--micro-batches` for each rank, and its dataset. Raises UserError."""
    from megatron_ettin.bench.synthetic import SyntheticRows
    from megatron_ettin.config.layouts import check_layout
    from megatron_ettin.config.overrides import given_keys
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.train.job import open_training_data

    if args.data:
        overrides = [*overrides, f"data.mixture={args.data}"]
    config = parse(size, objective, args.phase, args.config, overrides)
    rows = config.batch.micro_batch_rows
    if args.quick and "batch.micro_batch_rows" not in given_keys(args.config, overrides, args.phase):
        rows = min(rows, QUICK_ROWS)
    parallel = config.parallel
    dp = max(1, world // (parallel.tp * parallel.pp * parallel.cp))
    whole = rows * dp * args.micro_batches
    config = config.with_keys(
        {"batch.micro_batch_rows": rows, "batch.global_batch_rows": whole, "batch.warmup_tokens": 0}
    )
    check_layout(config, world)
    if args.data:
        return config, open_training_data(config)
    shape = config.data.seq_len, args.chunk_tokens, config.model.vocab_size
    return config, SyntheticRows(*shape, padded=config.data.batching == "padded")
