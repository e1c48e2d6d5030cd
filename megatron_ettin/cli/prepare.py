"""Text files, directories and JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) -> an indexed, tokenized dataset.

A text file is one document; a directory is read recursively in sorted order (.txt .md .rst .text and JSON lines).
Run the same command again to continue one that was killed. The output is the same for any number of workers.

  ettin prepare wiki.jsonl.zst books/ --out data/corpus --workers 16 --holdout 0.01 --seq-len 1024
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.config.counts import format_count
from megatron_ettin.config.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.data.dataset import Dataset
    from megatron_ettin.data.ingest.prepare import PrepareResult
    from megatron_ettin.data.ingest.request import PrepareRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text file, JSON lines file or directory")
    parser.add_argument("--out", required=True, metavar="DATASET", help="the dataset directory to make")
    parser.add_argument("--tokenizer", default="ettin", metavar="T", help="ettin (default), a directory or a hub name")
    parser.add_argument("--chunk-tokens", type=int, default=1024, metavar="N", help="longest chunk (default 1024)")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (default: our CPUs)")
    parser.add_argument("--format", default="auto", metavar="F", help="auto (by extension, default), text or jsonl")
    parser.add_argument("--text-key", default="text", metavar="K", help="the JSON key of the text (default text)")
    parser.add_argument("--id-key", default="id", metavar="K", help="the JSON key of the document's id (default id)")
    parser.add_argument("--holdout", type=float, default=0.0, metavar="F", help="fraction of documents for OUT/heldout")
    parser.add_argument("--min-chunk-tokens", type=int, default=None, metavar="N", help="fill up last pieces shorter")
    parser.add_argument("--skip-tokens", type=int, default=None, metavar="N", help="drop last pieces shorter")
    parser.add_argument("--seq-len", default=None, metavar="N[,N]", help="build the row plans of these lengths at once")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from megatron_ettin.cli.progress import progress_report
    from megatron_ettin.data.ingest.prepare import prepare

    request = request_from(args)
    try:
        with progress_report("prepare", "bytes") as progress:
            result = prepare(request, progress)
    except KeyboardInterrupt:
        print("ettin prepare: interrupted; run the same command again to continue", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(summary(request, result), indent=1))
    else:
        print_summary(request, result)
    return 0


def request_from(args: argparse.Namespace) -> PrepareRequest:
    from megatron_ettin.data.ingest.chunking import chunk_rule
    from megatron_ettin.data.ingest.request import PrepareRequest

    return PrepareRequest(
        inputs=tuple(args.inputs),
        out=Path(args.out),
        rule=chunk_rule(args.chunk_tokens, args.min_chunk_tokens, args.skip_tokens),
        tokenizer=args.tokenizer,
        format=args.format,
        text_key=args.text_key,
        id_key=args.id_key,
        holdout=args.holdout,
        workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
        seq_lens=seq_lens(args.seq_len),
    )


def seq_lens(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seq-len: {text!r}; give row lengths in tokens, such as 1024 or 1024,8192")
    return tuple(int(part) for part in parts)


def summary(request: PrepareRequest, result: PrepareResult) -> dict[str, Any]:
    return {
        **dataset_summary(result.dataset, request.seq_lens),
        "already_complete": result.already_complete,
        "tasks_resumed": result.tasks_resumed,
        "empty_files": result.empty_files,
        "seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens_written / result.seconds) if result.tokens_written else None,
        "heldout": None if result.heldout is None else dataset_summary(result.heldout, request.seq_lens),
    }


def dataset_summary(dataset: Dataset, lengths: tuple[int, ...]) -> dict[str, Any]:
    from megatron_ettin.data.rows import ensure_row_plan

    plans = [ensure_row_plan(dataset, seq_len) for seq_len in lengths]
    return {
        "dataset": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "documents": dataset.num_documents,
        "chunks": dataset.num_chunks,
        "tokens": dataset.num_tokens,
        "dropped_tokens": dataset.manifest.dropped_tokens,
        "empty_documents": dataset.manifest.empty_documents,
        "rows": [{"seq_len": plan.seq_len, "rows": plan.num_rows, "fill": round(plan.fill, 6)} for plan in plans],
    }


def print_summary(request: PrepareRequest, result: PrepareResult) -> None:
    content = summary(request, result)
    if result.already_complete:
        print(f"{result.dataset.path}: already complete, made with the same settings from the same inputs")
    for part in filter(None, (content, content["heldout"])):
        counts = f"{part['documents']:,} documents, {part['chunks']:,} chunks, {part['tokens']:,} tokens"
        passed_over = f", {part['empty_documents']:,} empty documents passed over" if part["empty_documents"] else ""
        print(f"{part['dataset']}: {counts} ({part['dropped_tokens']:,} dropped as too short){passed_over}")
        for plan in part["rows"]:
            print(f"  rows of {plan['seq_len']}: {plan['rows']:,}, {plan['fill']:.2%} full")
    if request.holdout and result.heldout is None:
        print(f"  no document fell into the held-out {request.holdout:g}: no heldout dataset")
    if result.empty_files:
        more = ", ..." if len(result.empty_files) > 3 else ""
        print(f"  {len(result.empty_files)} empty files passed over: {', '.join(result.empty_files[:3])}{more}")
    if result.tokens_written:
        resumed = f", after {result.tasks_resumed} tasks done before" if result.tasks_resumed else ""
        speed = format_count(result.tokens_written / result.seconds)
        print(f"  {result.seconds:.1f} s, {speed} tokens/s with {request.workers} workers{resumed}")
