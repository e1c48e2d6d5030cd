"""Validation loss of a run or checkpoint on a dataset: perplexity of a decoder, masked accuracy of an encoder.

Example:
  ettin eval runs/17m-mlm --data corpus/heldout --baseline corpus
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--data", type=Path, required=True, metavar="DATASET")
    parser.add_argument("--rows", type=int, help="only the first so many rows")
    parser.add_argument(
        "--baseline", type=Path, metavar="DATASET", help="also the unigram loss, by this dataset's counts"
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> None:
    from megatron_ettin.checkpoint.directory import resolve
    from megatron_ettin.data.mixture import MixtureEntry
    from megatron_ettin.data.order import open_corpus
    from megatron_ettin.train.evaluate import evaluate, unigram_loss, validation_batches
    from megatron_ettin.train.inference import alone
    from megatron_ettin.train.resume import check_tokenizer, load

    checkpoint = resolve(args.checkpoint)
    with alone(checkpoint) as machine:
        batches = validation_batches(machine, str(args.data))
        check_tokenizer(checkpoint, batches.corpus)
        load(machine, checkpoint, with_optimizer=False)
        result = evaluate(machine, batches, args.rows)
        answer = {**dataclasses.asdict(result), "checkpoint": str(checkpoint)}
        if result.objective == "clm":
            answer["perplexity"] = result.perplexity
        lines = [f"{checkpoint}: {result}"]
        if args.baseline:
            corpus = batches.corpus
            train = open_corpus(
                [MixtureEntry(str(args.baseline))], corpus.seq_len, batches.config.data.batching, 0, "baseline"
            )
            answer["unigram_loss"] = unigram_loss(train, batches, args.rows)
            lines.append(f"unigram loss of {args.baseline} on the same positions: {answer['unigram_loss']:.4f}")
    print(json.dumps(answer) if args.json else "\n".join(lines))
