"""Export every checkpoint of a run, and of the runs it continues, as revisions of one Hugging Face repository.

OUT gets a folder a revision (step0, step1000, ..., ext500, ..., decay200), each with weights, config, tokenizer, card
and parity record, `main` (the final one, with the card of the whole release and its training curve) and data_order/.
Run it again to continue after an interruption or to add later checkpoints.

Examples:
  ettin release runs/17m-mlm/decay --out released/17m-mlm --licence apache-2.0
  ettin release runs/17m-mlm/decay --out released/17m-mlm --push my-lab/ettin-17m-encoder
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the last phase's run, or all of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the release's folder")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "float32", "bfloat16"), default="fp32", help="type of weights"
    )
    parser.add_argument("--name", help="the model's name on its card (17m-encoder, or 176K-decoder of another shape)")
    parser.add_argument("--licence", "--license", metavar="SPDX", help="such as apache-2.0, mit, cc-by-4.0")
    parser.add_argument("--order", choices=("auto", "all", "none"), default="auto", help="data order files to write")
    parser.add_argument("--alone", action="store_true", help="leave out the runs that RUN continues")
    parser.add_argument("--workers", type=int, metavar="N", help="checkpoints at a time (default: by cores and memory)")
    parser.add_argument("--max-shard-bytes", default="5B", metavar="N", help="largest safetensors file (%(default)s)")
    parser.add_argument("--recheck", action="store_true", help="compare checksums of what is released already")
    parser.add_argument("--replace", action="store_true", help="replace revisions that hold other weights")
    parser.add_argument("--push", metavar="OWNER/REPO", help="then to the Hugging Face hub, a branch a revision")
    parser.add_argument("--private", action="store_true", help="--push makes a private repository")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    from megatron_ettin.base.errors import UserError

    plan = make_plan(args)
    if args.push:
        _check_push(args.push)
    from megatron_ettin.release import build
    from megatron_ettin.release.revision import WorkerLostError

    try:
        with _progress(args.json) as report:
            result = build.release(plan, report)
    except WorkerLostError as error:
        # not a user error: exit 1
        raise SystemExit(f"ettin release: {error}") from error
    answer = {"out": str(args.out), **dataclasses.asdict(result)}
    if result.failed:
        _print(answer, args.json)
        name, why = next(iter(result.failed.items()))
        pushed = "; nothing was pushed" if args.push else ""
        raise UserError(f"{len(result.failed)} of {len(result.revisions)} revisions failed{pushed}: {name}: {why}")
    if args.push:
        answer["push"] = _push(args)
    _print(answer, args.json)


def make_plan(args: argparse.Namespace) -> Any:
    """Check the options, read the runs, and return what to release. Raises UserError."""
    from megatron_ettin.base.errors import UserError
    from megatron_ettin.base.text import parse_count
    from megatron_ettin.config.tables import OBJECTIVES
    from megatron_ettin.convert.to_hf import SHORT
    from megatron_ettin.evaluate.inference import logits_of
    from megatron_ettin.release.build import ReleasePlan
    from megatron_ettin.release.chain import find_release_chain
    from megatron_ettin.release.record import ReleaseOptions
    from megatron_ettin.report.plots import overview_of_chain
    from megatron_ettin.runs.directory import last_phase

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
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
    again = (args.workers, args.recheck, args.replace)
    return ReleasePlan(chain, args.out, options, logits_of, overview_of_chain, args.order, *again, args.push)


def _check_push(repository: str) -> None:
    from megatron_ettin.base.errors import UserError

    try:
        from megatron_ettin.release.hub import check_repository
    except ImportError as error:
        raise UserError(f"--push: {error}; pip install huggingface_hub") from None
    check_repository(repository)


def _push(args: argparse.Namespace) -> dict[str, Any]:
    """Push all revisions that the index names, also those of deleted checkpoints."""
    from megatron_ettin.release.hub import push

    index = json.loads((args.out / "release.json").read_text(encoding="utf-8"))
    done = push(args.out, args.push, [one["revision"] for one in index["revisions"]], args.private)
    return {"url": done.url, "uploaded": done.uploaded, "kept": done.kept}


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[int, int, Any], None] | None]:
    """Yield a callback that shows progress on standard error; None with --json."""
    from megatron_ettin.base.progress import items_report

    if as_json:
        yield None
        return
    with items_report("release") as show:

        def report(done: int, total: int, outcome: Any) -> None:
            if outcome is None:
                show(0, total, f"{total} revisions to make")
                return
            show(done, total, f"{outcome.name}: {outcome.error or f'{outcome.seconds:.1f} s'}")

        yield report


def _print(answer: dict[str, Any], as_json: bool) -> None:
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
