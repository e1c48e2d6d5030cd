"""Convert checkpoints to and from Hugging Face folders, encoder and decoder, without loss. One tensor is in memory
at a time.

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
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", required=True, metavar="to-hf|from-hf|from-composer")
    out = _way(ways, "to-hf", "a checkpoint -> a folder that transformers loads", "runs/17m-mlm exported")
    out.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN", help="a run stands for its latest checkpoint"
    )
    out.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    out.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read back every tensor and compare logits with transformers (the default)",
    )
    out.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "fp32", "bf16"),
        default="float32",
        help="type of the weights (%(default)s)",
    )
    out.add_argument("--objective", metavar="mlm|clm", help="export an encoder as a decoder, or the reverse")
    out.add_argument("--max-shard-bytes", default="5B", metavar="N", help="largest safetensors file (%(default)s)")
    out.add_argument("--json", action="store_true", help="print the result as JSON")
    back = _way(ways, "from-hf", "a folder that transformers wrote -> a checkpoint of weights", "exported imported")
    back.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    back.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    back.add_argument("--objective", metavar="mlm|clm", help="make a decoder of an encoder's folder, or the reverse")
    back.add_argument("--json", action="store_true", help="print the result as JSON")
    summary = "a file of the original trainer -> a checkpoint of weights"
    theirs = _way(ways, "from-composer", summary, "ep0-ba5996-rank0.pt imported --config decoder_base.yaml")
    theirs.add_argument("file", type=Path, metavar="FILE.pt", help="nothing in it is executed")
    theirs.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    theirs.add_argument(
        "--config", type=Path, metavar="YAML", help="the run's YAML, or a config.json (default: the one in the file)"
    )
    theirs.add_argument("--objective", metavar="mlm|clm", help="import it as (default: what it was)")
    theirs.add_argument("--json", action="store_true", help="print the result as JSON")


def _way(ways: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    epilog = f"example:\n  ettin convert {name} {example}"
    formatter = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = ways.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=formatter
    )
    return parser


def run(args: argparse.Namespace) -> None:
    with _unwind_on_sigterm():
        _run(args)


@contextlib.contextmanager
def _unwind_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, which a scheduler sends, unwind the conversion, so that its temporary folder is removed."""

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


def _run(args: argparse.Namespace) -> None:
    from megatron_ettin.base.text import parse_count
    from megatron_ettin.convert.from_hf import from_hf
    from megatron_ettin.convert.to_hf import ExportOptions, to_hf
    from megatron_ettin.convert.verify import ParityError
    from megatron_ettin.platform.cpu import keep_freed_memory
    from megatron_ettin.runs.directory import last_phase

    keep_freed_memory()
    if args.way == "from-hf":
        with _progress("reading") as report:
            result = from_hf(args.hf_dir, args.out, report, args.objective)
        _print(result, _imported(result), args.json)
        return
    if args.way == "from-composer":
        from megatron_ettin.convert.composer import from_composer

        with _progress("reading") as report:
            result = from_composer(args.file, args.out, args.config, report, args.objective)
        _print(result, _imported(result), args.json)
        return
    args.checkpoint = last_phase(args.checkpoint)
    max_shard_bytes = parse_count(args.max_shard_bytes, "--max-shard-bytes")
    our_logits = _our_logits() if args.verify else None
    options = ExportOptions(args.dtype, args.objective, max_shard_bytes, args.verify, our_logits)
    with _progress("writing") as report:
        try:
            result = to_hf(args.checkpoint, args.out, options, report)
        except ParityError as error:
            # a bug of this package, not a user error: exit 1
            raise SystemExit(f"ettin convert: {error}") from error
    _print(result, _exported(result), args.json)


def _our_logits() -> Callable[..., Any]:
    from megatron_ettin.evaluate.inference import logits_of

    return logits_of


def _exported(result: dict[str, Any]) -> list[str]:
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
    return lines + _notes(result)


def _notes(result: dict[str, Any]) -> list[str]:
    return [f"note: {note}" for note in result["notes"]]


def _imported(result: dict[str, Any]) -> list[str]:
    size = result["size"] or "no published size"
    lines = [f"{result['source']} -> {result['out']}: {result['objective']}, {size}, {result['tensors']} tensors"]
    return lines + _notes(result)


def _print(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(result) if as_json else "\n".join(lines))


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    from megatron_ettin.base.progress import progress_report

    with progress_report(title, "tensors") as report:
        yield lambda done, total: report(done, total, 0)
