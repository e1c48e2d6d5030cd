"""Export every checkpoint of a run, and of the runs it continues, as revisions of one Hugging Face repository.

OUT gets a folder for each revision (step0, step1000, ..., ext500, ..., decay200) with weights, config, tokenizer, card
and parity record, `main` (the last revision, with the card of the whole release and its training curve) and
data_order/. Run it again to continue after an interruption or to add later checkpoints.

Examples:
  ettin release runs/17m-mlm/decay --out released/17m-mlm --licence apache-2.0
  ettin release runs/17m-mlm/decay --out released/17m-mlm --push my-lab/ettin-17m-encoder
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.release.build import ReleasePlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="the last phase's run, or all of them")
    add("--out", type=Path, required=True, metavar="DIR", help="the release's folder")
    add("--dtype", default="fp32", help="type of weights")
    add("--name", help="the model's name on its card (17m-encoder, or 176K-decoder of another shape)")
    add("--licence", "--license", metavar="SPDX", help="such as apache-2.0, mit, cc-by-4.0")
    add("--order", choices=("auto", "all", "none"), default="auto", help="data order files to write")
    add("--alone", action="store_true", help="leave out the runs that RUN continues")
    workers = "checkpoints at a time (default: by cores and memory)"
    add("--workers", type=int, at_least=1, metavar="N", help=workers)
    add("--max-shard-bytes")
    add("--recheck", action="store_true", help="compare checksums of what is released already")
    add("--replace", action="store_true", help="replace revisions that hold other weights")
    add("--push", metavar="OWNER/REPO", help="then to the Hugging Face hub, a branch a revision")
    add("--private", action="store_true", help="--push makes a private repository")
    add("--json")


def run(args: argparse.Namespace) -> None:
    """Release the runs' checkpoints, push them with --push, and print what was done. Raises UserError."""
    from megatron_ettin.base.progress import items_report
    from megatron_ettin.release import build
    from megatron_ettin.release.revision import WorkerLostError

    plan = make_plan(args)
    if args.push:
        try:
            from megatron_ettin.release.hub import check_repository
        except ImportError as error:
            raise UserError(f"--push: {error}; pip install huggingface_hub") from None
        check_repository(args.push)
    with contextlib.nullcontext() if args.json else items_report("release") as show:

        def report(done: int, total: int, outcome: Any) -> None:
            assert show is not None
            if outcome is None:
                show(0, total, f"{total} revisions to make")
            else:
                show(done, total, f"{outcome.name}: {outcome.error or f'{outcome.seconds:.1f} s'}")

        try:
            result = build.release(plan, report if show is not None else None)
        except WorkerLostError as error:
            # a worker that was killed is not a user error: exit 1
            raise SystemExit(f"ettin release: {error}") from error
    answer = {"out": str(args.out), **dataclasses.asdict(result)}
    if args.push and not result.failed:
        answer["push"] = push_revisions(args)
    show_result(answer, args.json)
    if result.failed:
        name, why = next(iter(result.failed.items()))
        pushed = "; nothing was pushed" if args.push else ""
        raise UserError(f"{len(result.failed)} of {len(result.revisions)} revisions failed{pushed}: {name}: {why}")


def make_plan(args: argparse.Namespace) -> ReleasePlan:
    """Check the options, read the runs, and return what to release. Raises UserError."""
    from megatron_ettin.base.text import parse_count
    from megatron_ettin.config.tables import OBJECTIVES
    from megatron_ettin.convert.to_hf import SHORT
    from megatron_ettin.evaluate.inference import logits_of
    from megatron_ettin.release.build import ReleasePlan
    from megatron_ettin.release.chain import find_release_chain
    from megatron_ettin.release.revision import ReleaseOptions
    from megatron_ettin.report.plots import overview_of_chain
    from megatron_ettin.runs.directory import last_phase

    max_shard_bytes = parse_count(args.max_shard_bytes, "--max-shard-bytes")
    if max_shard_bytes < 1:
        raise UserError(f"--max-shard-bytes {args.max_shard_bytes}: must be at least 1")
    for option in ("name", "licence"):
        value = getattr(args, option)
        if value is not None and (not value.strip() or "\n" in value):
            raise UserError(f"--{option} {value!r}: give one line of text")
    chain = find_release_chain([last_phase(run) for run in args.runs], args.alone)
    exported = OBJECTIVES[chain.objective].exports[0]
    name = args.name or f"{chain.runs[-1].model_name}-{'encoder' if exported == 'mlm' else 'decoder'}"
    options = ReleaseOptions(name, SHORT.get(args.dtype, args.dtype), max_shard_bytes, args.licence)
    settings = (args.order, args.workers, args.recheck, args.replace, args.push)
    return ReleasePlan(chain, args.out, options, logits_of, overview_of_chain, *settings)


def push_revisions(args: argparse.Namespace) -> dict[str, Any]:
    """Push all revisions in OUT/release.json, also those of deleted checkpoints. Return url, uploaded and kept."""
    from megatron_ettin.release.hub import push

    index = json.loads((args.out / "release.json").read_text(encoding="utf-8"))
    done = push(args.out, args.push, [one["revision"] for one in index["revisions"]], args.private)
    return {"url": done.url, "uploaded": done.uploaded, "kept": done.kept}


def show_result(answer: dict[str, Any], as_json: bool) -> None:
    """Print the revisions that were made, existed before, failed and were pushed."""
    if as_json:
        print(json.dumps(answer, indent=1))
        return
    for note in answer["notes"]:
        print(f"note: {note}")
    counts = f"{len(answer['made'])} made, {len(answer['kept'])} were there"
    if answer["failed"]:
        counts += f", {len(answer['failed'])} failed"
        for name, why in answer["failed"].items():
            print(f"failed: {name}: {why}")
    print(f"{answer['out']}: {len(answer['revisions'])} revisions ({counts}) in {answer['seconds']:.0f} s")
    if answer.get("push"):
        pushed = answer["push"]
        print(f"{pushed['url']}: {len(pushed['uploaded'])} uploaded, {len(pushed['kept'])} were there")
