"""List which documents and spans each step of a run used or will use, for any step, from its configuration alone.

Steps are numbered as in metrics.jsonl; A:B means A to B - 1.

Example:
  ettin order runs/17m-mlm --steps 1:11 --out order.parquet
  ettin order runs/17m-mlm --steps 1:3 --batches seen.npz
  ettin order runs/17m-mlm --fingerprint
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import counted, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_OR_CONFIG")
    add("--steps", metavar="A:B", help="steps A to B - 1")
    add("--out", type=Path, metavar="ORDER.parquet", help="write the table instead of printing it")
    add("--batches", type=Path, metavar="OUT.npz", help="write inputs, labels and spans as the model sees them")
    add("--fingerprint", action="store_true", help="print the fingerprint of the data order")
    add("--json", help="print one JSON object for each chunk")


def run(args: argparse.Namespace) -> None:
    """Print or write the chunks of the steps, or print the order's fingerprint."""
    from megatron_ettin.runs import order_export
    from megatron_ettin.runs.directory import last_phase

    if not args.fingerprint and args.steps is None:
        raise UserError("--steps A:B or --fingerprint: give one of them")
    if args.steps is None and (args.out or args.batches):
        raise UserError(f"{args.out or args.batches}: needs --steps A:B, the steps to write")
    steps = order_export.parse_steps(args.steps) if args.steps else range(0)
    for out in (args.out, args.batches):
        if out is not None and not out.parent.is_dir():
            raise UserError(f"{out}: the folder {out.parent} does not exist")
    args.run = last_phase(args.run)
    config, corpus = order_export.open_run(args.run)
    if steps:
        order_export.check_same_order(args.run, corpus)
    if args.fingerprint:
        print(json.dumps({"fingerprint": corpus.fingerprint}) if args.json else corpus.fingerprint)
    if args.out is not None:
        print(f"{args.out}: {counted(order_export.write_parquet(args.out, config, corpus, steps), 'chunk')}")
    if args.batches is not None:
        print(f"{args.batches}: {counted(order_export.write_batches(args.batches, config, corpus, steps), 'row')}")
    if args.out is None and args.batches is None:
        for record in order_export.spans(config, corpus, steps):
            print(json.dumps(record) if args.json else format_chunk(record))


def format_chunk(record: dict[str, Any]) -> str:
    """Return the line to print for a record of `order_export.spans`, which is one chunk."""
    span = f"tokens {record['start_token']}-{record['end_token'] - 1}"
    where = f"{printable(record['source'])} {printable(record['document'])}"
    return f"step {record['step']} slot {record['slot']} {where} {span}"
