"""How fast a run trains here: tokens/s, TFLOP/s, MFU, memory, and where a step's time goes. Nothing is trained or kept.

Each combination of --sweep values is measured in turn and appended to --out as a line of JSON; the same command again
goes on with those that are missing. Rows are synthetic, with documents' lengths, unless --data names a dataset.

Example:
  ettin bench --size 150m --sweep batch.micro_batch_rows=16,32,64 --sweep precision.name=bf16,fp8-current
  torchrun --nproc-per-node 8 --no-python ettin bench --size 1b --objective clm --sweep parallel.tp=1,2 --picture 1b.png
  ettin bench --compare before.jsonl after.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ettin.config.schema import Config
    from megatron_ettin.config.sweep import Member
    from megatron_ettin.platform import Platform
    from megatron_ettin.platform.rendezvous import Place

QUICK_STEPS, QUICK_ROWS = 3, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", help="17m 32m 68m 150m 400m 1b")
    parser.add_argument("--objective", default="mlm")
    parser.add_argument("--phase", default="pretrain")
    parser.add_argument("--config", type=Path, metavar="YAML", help="a site file, as of `ettin train`")
    parser.add_argument("--data", metavar="DATASET", help="real rows")
    parser.add_argument("--chunk-tokens", type=float, default=615.4, help="mean of synthetic documents (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of each rank in a step (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="STEPS", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="that count (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two micro-batches of two rows, three steps")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="(%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what --out has, too")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what moved beyond the noise")
    parser.add_argument("words", nargs="*", metavar="key=value", help="as of `ettin train`")


def run(args: argparse.Namespace) -> None:
    from megatron_ettin.bench import results
    from megatron_ettin.config.errors import UserError
    from megatron_ettin.config.sweep import Member, members
    from megatron_ettin.platform import detect
    from megatron_ettin.platform.rendezvous import find_place, forget, from_chief

    if args.compare:
        print(results.comparison(results.compare(*args.compare)))
        return
    for name in ("steps", "micro_batches", "chunk_tokens"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: has to be above 0")
    if args.quick:
        args.micro_batches, args.steps, args.warm_up = 2, QUICK_STEPS, 1
    place = find_place()
    device = next((word.partition("=")[2] for word in args.words if word.startswith("run.device=")), "auto")
    platform = detect(device, place.local_rank)
    rows = []
    try:
        # read once: a rank that comes later would find what rank 0 has begun
        known = from_chief(place, platform, lambda: results.read(args.out))
        for member in members(args.sweep) if args.sweep else [Member("", {})]:
            row = one(args, member, place, platform, known)
            rows.append(row)
    finally:
        forget()
    if place.rank == 0:
        print(results.table(rows))
        told(rows)
        if args.picture and any(row["state"] == results.DONE for row in rows):
            from megatron_ettin.bench.picture import draw

            args.picture.write_bytes(draw(rows))


def one(
    args: argparse.Namespace, member: Member, place: Place, platform: Platform, known: dict[str, Any]
) -> dict[str, Any]:
    """One combination: measured, or what is known of it. Every rank returns the same."""
    from megatron_ettin.bench import results
    from megatron_ettin.config.errors import UserError
    from megatron_ettin.config.layouts import check_layout
    from megatron_ettin.plan.memory import estimate
    from megatron_ettin.train.measure import Lengths, measure, out_of_memory

    size, objective = member.values.get("size", args.size), member.values.get("objective", args.objective)
    row: dict[str, Any] = {"size": size, "objective": objective, "phase": args.phase, "gpus": place.world}
    row |= {"words": [*args.words, *member.words], "device": platform.name}
    found = known.get(results.key_of(row))
    if found is not None and not args.again:
        died = found["state"] == results.BEGAN
        return found | ({"state": results.NO_MEMORY, "reason": "it ended the process"} if died else {})

    def keep(state: dict[str, Any]) -> dict[str, Any]:
        if place.rank == 0:
            results.append(args.out, row | state)
            if state["state"] == results.DONE:
                print(f"{results.name_of(row)}: {state['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU", flush=True)
        return row | state

    try:
        config, corpus = resolve(args, size, objective, row["words"], place.world)
        keep({"state": results.BEGAN})
        figures = measure(config, corpus, place, platform, Lengths(args.warm_up, args.steps))
    except UserError as error:
        if size is None:
            raise
        return keep({"state": results.INVALID, "reason": str(error)})
    except out_of_memory() as error:
        if place.world > 1:
            raise  # the others wait in a collective: the job ends, and goes on behind this one when started again
        return keep({"state": results.NO_MEMORY, "reason": str(error).splitlines()[0][:200]})
    dp = check_layout(config, place.world)
    described = {
        "predicted_memory_bytes": estimate(config, dp, platform.is_gpu).total_bytes,
        "seq_len": config.data.seq_len,
        "chunk_tokens": args.chunk_tokens if args.data is None else None,
        "precision": config.precision.name,
        "micro_batch_rows": config.batch.micro_batch_rows,
        "global_batch_rows": config.batch.global_batch_rows,
    }
    return keep({"state": results.DONE, **described, **figures})


def resolve(args: argparse.Namespace, size: str, objective: str, words: list[str], world: int) -> tuple[Config, Any]:
    """The run to time, its batch cut to a few micro-batches, and its rows. Raises UserError."""
    from megatron_ettin.bench.synthetic import SyntheticRows
    from megatron_ettin.config.errors import UserError
    from megatron_ettin.config.layouts import check_layout
    from megatron_ettin.config.resolve import parse
    from megatron_ettin.train.loop import open_training_data

    if size is None:
        raise UserError("--size: is missing")
    if args.data:
        words = [*words, f"data.mixture={args.data}"]
    config = parse(size, objective, args.phase, args.config, words)
    rows = config.batch.micro_batch_rows
    if args.quick and not any(word.startswith("batch.micro_batch_rows=") for word in words):
        rows = min(rows, QUICK_ROWS)
    batch = dataclasses.replace(config.batch, micro_batch_rows=rows, global_batch_rows=rows, warmup_tokens=0)
    dp = check_layout(dataclasses.replace(config, batch=batch), world)
    batch = dataclasses.replace(batch, global_batch_rows=rows * dp * args.micro_batches)
    config = dataclasses.replace(config, batch=batch)
    check_layout(config, world)
    if args.data:
        return config, open_training_data(config)
    return config, SyntheticRows(config.data.seq_len, args.chunk_tokens, config.model.vocab_size)


def told(rows: list[dict[str, Any]]) -> None:
    """What the figures are divided by, and where the fastest one's step goes."""
    done = [row for row in rows if row["state"] == "done"]
    if not done:
        return
    best = max(done, key=lambda row: row["tokens_per_second_per_gpu"])
    print(f"MFU: of {best['peak_flops'] / 1e12:,.3g} TFLOP/s a GPU, {best['peak_source']}")
    whole = sum(best["phase_seconds"].values())
    parts = sorted(best["phase_seconds"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in parts if seconds)
    print(f"a step of the fastest, {whole:.3f} s: {shares}")
    if best.get("communication_bytes"):
        sent = ", ".join(f"{axis} {count / 2**20:,.1f}" for axis, count in best["communication_bytes"].items())
        print(f"it hands to collectives and transfers, MiB a rank: {sent}")
    if best.get("predicted_memory_bytes"):
        names = {"tensors at its fullest": "peak_tensor_bytes", "as predicted": "predicted_memory_bytes"}
        names["in all (of a process without a GPU: resident)"] = "peak_memory_bytes"
        print("memory of the fullest rank, GiB: " + ", ".join(f"{best[k] / 2**30:.2f} {n}" for n, k in names.items()))
