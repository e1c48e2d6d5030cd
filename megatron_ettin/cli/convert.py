"""Convert checkpoints to and from Hugging Face folders, encoder and decoder, without loss.

One tensor is in memory at a time.

Examples:
  ettin convert to-hf runs/17m-mlm exported --dtype bf16
  ettin convert from-hf exported imported
  ettin convert from-composer ep0-ba5996-rank0.pt imported
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.config.tables import EXPORTED

if TYPE_CHECKING:
    from megatron_ettin.convert.verify import Logits

# direction (subcommand) -> summary, example
WAYS = {
    "to-hf": ("a checkpoint -> a folder that transformers loads", "runs/17m-mlm exported"),
    "from-hf": ("a folder that transformers wrote -> a checkpoint of weights", "exported imported"),
    "from-composer": (
        "a file of the original trainer -> a checkpoint of weights",
        "ep0-ba5996-rank0.pt imported --config decoder_base.yaml",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="|".join(WAYS))
    raw = argparse.RawDescriptionHelpFormatter
    for way, (summary, example) in WAYS.items():
        epilog = f"example:\n  ettin convert {way} {example}"
        add = ways.add_parser(way, help=summary, description=summary, epilog=epilog, formatter_class=raw).add_argument
        if way == "to-hf":
            checkpoint = "a run stands for its latest checkpoint"
            add("checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN", help=checkpoint)
        elif way == "from-hf":
            add("hf_dir", type=Path, metavar="HF_DIR")
        else:
            add("file", type=Path, metavar="FILE.pt", help="nothing in it is executed")
        add("out", type=Path, metavar="OUT", help="a new folder")
        if way == "to-hf":
            verify = "read back every tensor and compare logits with transformers (the default)"
            add("--verify", action=argparse.BooleanOptionalAction, default=True, help=verify)
            add("--dtype", default="float32", help="type of the weights (%(default)s)")
            objective = "export an encoder as a decoder, or the reverse"
            add("--max-shard-bytes")
        elif way == "from-hf":
            objective = "make a decoder of an encoder's folder, or the reverse"
        else:
            add("--config", help="the run's YAML, or a config.json (default: the one in the file)")
            objective = "import it as (default: what it was)"
        add("--objective", choices=EXPORTED, metavar="mlm|clm", help=objective)
        add("--json")


def run(args: argparse.Namespace) -> None:
    """Convert in the direction that the options name, and print the result."""
    from megatron_ettin.base.progress import progress_report
    from megatron_ettin.platform.cpu import keep_freed_memory

    keep_freed_memory()
    with unwinding_on_sigterm(), progress_report("writing" if args.way == "to-hf" else "reading", "tensors") as report:
        if args.way == "to-hf":
            result = export(args, report)
        elif args.way == "from-hf":
            from megatron_ettin.convert.from_hf import from_hf

            result = from_hf(args.hf_dir, args.out, report, args.objective)
        else:
            from megatron_ettin.convert.composer import from_composer

            result = from_composer(args.file, args.out, args.config, report, args.objective)
    lines = exported_lines(result) if args.way == "to-hf" else [imported_line(result)]
    lines += [f"note: {note}" for note in result["notes"]]
    print(json.dumps(result) if args.json else "\n".join(lines))


def export(args: argparse.Namespace, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Export a checkpoint, and return the result of `to_hf`. Raises UserError, and SystemExit if parity fails."""
    from megatron_ettin.base.text import parse_count
    from megatron_ettin.convert.to_hf import ExportOptions, to_hf
    from megatron_ettin.convert.verify import ParityError
    from megatron_ettin.runs.directory import last_phase

    our_logits: Logits | None = None
    if args.verify:
        from megatron_ettin.evaluate.inference import logits_of

        our_logits = logits_of
    checkpoint, shard_bytes = last_phase(args.checkpoint), parse_count(args.max_shard_bytes, "--max-shard-bytes")
    options = ExportOptions(args.dtype, args.objective, shard_bytes, args.verify, our_logits)
    try:
        return to_hf(checkpoint, args.out, options, report)
    except ParityError as error:
        # a bug of this package, not a user error: exit 1
        raise SystemExit(f"ettin convert: {error}") from error


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Raise SystemExit in the block on SIGTERM, which a scheduler sends, so that temporary folders are removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exported_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines to print about the result of `to_hf`."""
    what = f"{result['objective']}, {result['dtype']}, step {result['step']}"
    lines = [f"{result['checkpoint']} -> {result['out']}: {what}", f"weights: {', '.join(result['files'])}"]
    if not result["tokenizer"]:
        lines.append("tokenizer: none in the checkpoint, none exported")
    parity = result["parity"]
    if parity is not None:
        difference, allowed = parity["max_abs_logit_difference"], parity["tolerance"]
        argmax = "equal" if parity["argmax_equal"] else f"equal but for {parity['near_ties']} ties"
        lines.append(
            f"verified: {parity['tensors']} tensors bit-identical; logits differ from transformers"
            f" {parity['transformers']} by at most {difference:.1e} (allowed {allowed:.0e}) over {parity['tokens']}"
            f" tokens, argmax {argmax}"
        )
    return lines


def imported_line(result: dict[str, Any]) -> str:
    """Return the line to print about the result of an import."""
    size = result["size"] or "no published size"
    return f"{result['source']} -> {result['out']}: {result['objective']}, {size}, {result['tensors']} tensors"
