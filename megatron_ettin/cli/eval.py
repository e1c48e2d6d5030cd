"""Compute the validation loss of a run or checkpoint on datasets, in total and by source.

It also prints the perplexity of a decoder, or the masked accuracy of an encoder. Sources are the datasets and, in a
dataset prepared from several INPUTs, these inputs.

Example:
  ettin eval runs/17m-mlm --data data/corpus/heldout --baseline data/corpus
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.tables import ROW_OBJECTIVES
from megatron_ettin.config.values import validation_sets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="RUN|CHECKPOINT|HF_DIR")
    add("--data", action="append", metavar="[NAME=]DATASET", help="may be given several times")
    reads = "mlm, clm or mntp: how to read rows (as it was trained)"
    add("--objective", choices=ROW_OBJECTIVES, metavar="KIND", help=reads)
    add("--seq-len", type=int, metavar="N", help="tokens of a row (what the model was trained with)")
    add("--rows", type=int, at_least=1, help="only so many rows, shared out over the sources")
    add("--baseline", type=Path, metavar="DATASET", help="also the unigram loss, by this dataset's counts")
    harness = "lm-evaluation-harness or mteb on the exported folder"
    add("--harness", choices=("lm", "mteb"), metavar="lm|mteb", help=harness)
    reading = "with --harness: evaluate a model as what it was not trained as"
    add("--as", dest="reading", choices=("encoder", "decoder"), help=reading)
    add("--tasks", metavar="NAME,NAME", help="with --harness: its tasks")
    add("--task-path", type=Path, metavar="PATH", help="lm: folder of task files; mteb: Python file")
    add("--limit", type=int, metavar="N", help="only so many examples of each task of lm")
    add("--batch-rows", type=int, default=16, metavar="N", help="texts at a time (%(default)s)")
    add("--json")


def run(args: argparse.Namespace) -> None:
    """Evaluate the checkpoint on datasets, or by a harness, and print the figures."""
    from megatron_ettin.runs.directory import last_phase

    args.checkpoint = last_phase(args.checkpoint)
    if args.harness:
        run_harness(args)
        return
    if not args.data:
        raise UserError("--data: name a dataset, or --harness")
    datasets = parse_datasets(args.data)
    from megatron_ettin.convert.from_hf import as_checkpoint
    from megatron_ettin.data.blended_dataset import open_blended_dataset
    from megatron_ettin.data.mixture import MixtureEntry
    from megatron_ettin.evaluate.evaluation import evaluate, unigram_loss
    from megatron_ettin.evaluate.inference import open_evaluation

    with (
        as_checkpoint(args.checkpoint) as checkpoint,
        open_evaluation(checkpoint, datasets, args.objective, args.seq_len) as (train_state, held_out),
    ):
        result = evaluate(train_state, held_out, args.rows)
        shown = args.checkpoint if checkpoint.name == "imported" else checkpoint
        answer = {**result.to_json(), "checkpoint": str(shown)}
        whole, *parts = result.lines()
        lines = [f"{shown}: {whole}", *parts]
        if args.baseline:
            corpus = held_out.corpus
            train = open_blended_dataset(
                [MixtureEntry(str(args.baseline))], corpus.seq_len, corpus.batching, 0, "baseline"
            )
            answer["unigram_loss"] = unigram_loss(train, held_out, args.rows)
            lines.append(f"unigram loss of {args.baseline} on the same positions: {answer['unigram_loss']:.4f}")
    print(json.dumps(answer) if args.json else "\n".join(lines))


def run_harness(args: argparse.Namespace) -> None:
    """Export the checkpoint if necessary, run the harness on the folder, and print its results."""
    from megatron_ettin.convert.from_hf import is_hf_folder
    from megatron_ettin.convert.to_hf import ExportOptions, to_hf
    from megatron_ettin.evaluate import harness

    tasks = [task for task in (args.tasks or "").split(",") if task]
    objective = harness.check(args.harness, tasks, args.task_path, args.checkpoint, args.reading)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ettin-") as temporary:
        folder = args.checkpoint
        if not is_hf_folder(folder):
            folder = Path(temporary) / "exported"
            notes += to_hf(args.checkpoint, folder, ExportOptions(objective=objective))["notes"]
        elif objective not in harness.trained_as(folder):
            notes.append("this folder is a decoder's: its hidden states are causal, and are pooled as they are")
        results = harness.evaluate(args.harness, folder, tasks, args.task_path, args.limit, args.batch_rows)
    if args.json:
        answer = {"checkpoint": str(args.checkpoint), "harness": args.harness, "notes": notes, "results": results}
        print(json.dumps(answer))
        return
    for note in notes:
        print(f"note: {note}")
    for task, measures in results.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items()))


def parse_datasets(given: list[str]) -> dict[str, str]:
    """Return name -> path of the `--data` values; unnamed ones are named as in `data.validation`. Raises UserError."""
    named: dict[str, str] = {}
    unnamed: list[str] = []
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            unnamed.append(word)
        elif name in named:
            raise UserError(f"--data: {name} is given twice; give each dataset its own name")
        else:
            named[name] = path
    by_folder = validation_sets(unnamed, "--data") if unnamed else {}
    if twice := sorted(set(by_folder) & set(named)):
        raise UserError(f"--data: {twice[0]} is given twice; give each dataset its own name")
    return {**by_folder, **(validation_sets(named, "--data") if named else {})}
