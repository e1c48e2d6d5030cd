"""Turn texts or token ids from files, directories and URLs into an indexed, tokenized dataset.

INPUT: text files (one document each), JSON lines (.jsonl .ndjson, also .gz .zst .bz2 .xz, .json.gz), parquet, datasets
saved to disk, MDS directories of texts or token ids, Megatron's .bin/.idx, a dataset of `ettin prepare`, or a directory
with any of them, one kind in each folder, read recursively in sorted order. A URL (s3:// gs:// hf:// memory://) is read
if its package is installed.
Run the same command again to continue one that was killed. The output is the same for any number of workers, on one
machine, a SLURM cluster (a job array) or Ray.

  ettin prepare wiki.jsonl.zst books/ --out data/corpus --workers 16 --holdout 0.01 --seq-len 1024
  ettin prepare s3://bucket/dclm --out data/dclm --executor slurm --slurm-partition cpu --workers 200 --wait
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import EXIT_INTERRUPTED, UserError
from megatron_ettin.base.text import counted, format_count

if TYPE_CHECKING:
    from megatron_ettin.data.dataset import Dataset
    from megatron_ettin.prepare.chunking import ChunkRule
    from megatron_ettin.prepare.request import PrepareRequest
    from megatron_ettin.prepare.run import PrepareResult

FORMATS = ("auto", "text", "jsonl", "parquet", "datasets", "mds", "indexed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, directory or URL; see above")
    add("--out", required=True, metavar="DATASET", help="the dataset directory to make")
    add("--tokenizer", default="ettin", metavar="DIR|NAME", help="ettin (default), a directory or a hub name")
    add("--chunk-tokens", type=int, default=1024, metavar="N", help="longest chunk (default 1024)")
    add("--workers", type=int, metavar="N", help="processes (default: the CPUs that this process may use)")
    formats = "auto (default), text, jsonl, parquet, datasets, mds or indexed"
    add("--format", choices=FORMATS, default="auto", metavar="F", help=formats)
    add("--text-key", metavar="K", help="key or column of the text (default text)")
    add("--tokens-key", metavar="K", help="column of token ids (default input_ids)")
    add("--id-key", default="id", metavar="K", help="key or column of the document's id (default id)")
    add("--holdout", type=float, default=0.0, metavar="F", help="fraction of documents for OUT/heldout")
    chunking = "recipe (default) or plain: keep remainders"
    add("--chunking", choices=("recipe", "plain"), default="recipe", metavar="C", help=chunking)
    ends = "chunks that end in [SEP]: every (default), last of a document, none"
    add("--end-token", choices=("every", "last", "none"), default="every", metavar="E", help=ends)
    add("--min-chunk-tokens", type=int, metavar="N", help="fill up last pieces shorter")
    add("--skip-tokens", type=int, metavar="N", help="drop last pieces shorter")
    add("--seq-len", metavar="N[,N]", help="build the packing indices of these lengths at once")
    add("--json", help="print the summary as JSON")
    add("--replan", action="store_true", help="the inputs changed: plan anew, keep what is unchanged")
    copied = "a finished DATASET: inputs of the same names and sizes are the same, whatever their times"
    add("--accept-copied", action="store_true", help=copied)
    scale = parser.add_argument_group("at scale").add_argument
    executors = ("local", "slurm", "ray")
    scale("--executor", choices=executors, default="local", metavar="E", help="local (default), slurm or ray")
    scale("--wait", action="store_true", help="slurm: wait until the dataset is complete")
    scale("--slurm-partition", metavar="P", help="partition of the jobs (default: the cluster's)")
    scale("--slurm-time", default="24:00:00", metavar="T", help="time limit of each job (default 24:00:00)")
    slurm_arg = "another option of sbatch, such as account=A"
    scale("--slurm-arg", action="append", default=[], metavar="K=V", help=slurm_arg)


def run(args: argparse.Namespace) -> int:
    """Make the dataset, or submit the jobs that make it, print what was done, and return the exit status."""
    from megatron_ettin.base.progress import progress_report
    from megatron_ettin.base.text import refuse_secrets
    from megatron_ettin.prepare.cluster import Submitted
    from megatron_ettin.prepare.run import prepare

    for text in (*args.inputs, str(args.out)):
        refuse_secrets(text, "INPUT" if text in args.inputs else "--out")
    request = build_request(args)
    try:
        with progress_report("prepare", "bytes") as progress:
            result = prepare(request, progress)
    except KeyboardInterrupt:
        print("ettin prepare: interrupted; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(result, Submitted):
        if args.json:
            print(json.dumps({"dataset": str(request.out), **asdict(result)}, indent=1))
        else:
            print(f"{request.out}: {result}\n  run the same command again to see how far it is")
    elif args.json:
        print(json.dumps(summary(request, result), indent=1))
    else:
        print_summary(request, result)
    return 0


def build_request(args: argparse.Namespace) -> PrepareRequest:
    """Build the request from the command line. Raises UserError."""
    from megatron_ettin.prepare.request import PrepareRequest

    return PrepareRequest(
        inputs=tuple(args.inputs),
        out=Path(args.out),
        rule=build_rule(args),
        tokenizer=args.tokenizer,
        format=args.format,
        text_key=args.text_key or "text",
        tokens_key=args.tokens_key or "input_ids",
        tokens_first=args.tokens_key is not None and args.text_key is None,
        id_key=args.id_key,
        holdout=args.holdout,
        workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
        seq_lens=parse_seq_lens(args.seq_len),
        executor=args.executor,
        replan=args.replan,
        accept_copied=args.accept_copied,
        wait=args.wait,
        slurm_time=args.slurm_time,
        slurm_partition=args.slurm_partition,
        slurm_arguments=tuple(map(parse_key_value, args.slurm_arg)),
    )


def parse_key_value(text: str) -> tuple[str, str]:
    """Return key and value of a `--slurm-arg`. Raises UserError."""
    key, equals, value = text.lstrip("-").partition("=")
    if not equals or not key:
        raise UserError(f"--slurm-arg: {text!r}; give KEY=VALUE, such as account=nlp")
    return key, value


def build_rule(args: argparse.Namespace) -> ChunkRule:
    """Build the rule by which documents are cut into chunks. Raises UserError."""
    from megatron_ettin.prepare.chunking import chunk_rule

    least, skip = args.min_chunk_tokens, args.skip_tokens
    if args.chunking == "plain":
        if least or skip:
            raise UserError("--chunking plain keeps every piece; leave out --min-chunk-tokens and --skip-tokens")
        least, skip = 0, 0
    return chunk_rule(args.chunk_tokens, least, skip, args.end_token)


def parse_seq_lens(text: str | None) -> tuple[int, ...]:
    """Return the row lengths of `--seq-len`. Raises UserError."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seq-len: {text!r}; give row lengths in tokens, such as 1024 or 1024,8192")
    return tuple(int(part) for part in parts)


def summary(request: PrepareRequest, result: PrepareResult) -> dict[str, Any]:
    """Return the object that `--json` prints about a finished dataset."""
    return {
        **dataset_summary(result.dataset, request.seq_lens),
        "already_complete": result.already_complete,
        "tasks_resumed": result.tasks_resumed,
        "passed_over": result.passed_over.urls,
        "seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens_written / result.seconds) if result.tokens_written else None,
        "heldout": None if result.heldout is None else dataset_summary(result.heldout, request.seq_lens),
    }


def dataset_summary(dataset: Dataset, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return the counts of a dataset and, for each row length in `lengths`, of its packed rows, which are built."""
    from megatron_ettin.data.packing_index import PackingIndex

    indices = [PackingIndex.build_or_open(dataset, seq_len) for seq_len in lengths]
    return {
        "dataset": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "documents": dataset.num_documents,
        "chunks": dataset.num_chunks,
        "tokens": dataset.num_tokens,
        "dropped_tokens": dataset.manifest.dropped_tokens,
        "empty_documents": dataset.manifest.empty_documents,
        "rows": [{"seq_len": one.seq_len, "rows": one.num_rows, "fill": round(one.fill, 6)} for one in indices],
    }


def print_summary(request: PrepareRequest, result: PrepareResult) -> None:
    """Print as text what was made, how full its rows are, and how fast it was."""
    content = summary(request, result)
    if result.already_complete:
        times = ", sizes and times" if result.times_compared else " and sizes (times were not compared)"
        print(f"{result.dataset.path}: already complete: the same settings, inputs of the same names{times}")
    for part in filter(None, (content, content["heldout"])):
        counts = f"{part['documents']:,} documents, {part['chunks']:,} chunks, {part['tokens']:,} tokens"
        passed_over = f", {part['empty_documents']:,} empty documents passed over" if part["empty_documents"] else ""
        print(f"{part['dataset']}: {counts} ({part['dropped_tokens']:,} dropped as too short){passed_over}")
        for plan in part["rows"]:
            print(f"  rows of {plan['seq_len']}: {plan['rows']:,}, {plan['fill']:.2%} full")
    if request.holdout and result.heldout is None:
        print(f"  no document fell into the held-out {request.holdout:g}: no heldout dataset")
    for line in result.passed_over.lines():
        print(f"  {line}")
    if result.tokens_written:
        resumed = f", after {result.tasks_resumed} tasks done before" if result.tasks_resumed else ""
        speed = format_count(result.tokens_written / result.seconds)
        workers = counted(request.workers, "worker")
        print(f"  {result.seconds:.1f} s, {speed} tokens/s with {workers}{resumed}")
