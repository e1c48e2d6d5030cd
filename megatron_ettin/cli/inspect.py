"""Show what a dataset, checkpoint or run holds: counts, tokenizer, sources, files, packing.

--verify reads every byte and checks it against the recorded sha256; --sample shows decoded chunks.

  ettin inspect data/corpus --sample 3
  ettin inspect runs/17m-mlm/checkpoints/step_000000100 --verify
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.text import KEPT_OF_TEXTS, printable, printable_json

if TYPE_CHECKING:
    from megatron_ettin.data.dataset import Dataset
    from megatron_ettin.data.verify import Verified

SHARDS_SHOWN = 12
SOURCES_SHOWN = 30
SAMPLE_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("path", metavar="PATH", help="a dataset, checkpoint or run directory")
    add("--verify", action="store_true", help="check the sha256 of every file")
    add("--sample", type=int, at_least=0, default=0, metavar="N", help="decode N chunks of a dataset")
    add("--json", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description of a dataset, checkpoint or run, and return 0."""
    from megatron_ettin.runs.directory import last_phase

    path = last_phase(Path(args.path))
    if not path.is_dir():
        fault = "is a file; give a dataset, checkpoint or run directory" if path.is_file() else "no such directory"
        raise UserError(f"{path}: {fault}")
    is_dataset = (path / "manifest.json").is_file()
    if not is_dataset and any((path / name).exists() for name in ("integrity.json", "config.yaml")):
        from megatron_ettin.report.inspection import describe, render

        facts = describe(path, verify=args.verify)
        print(printable_json(facts) if args.json else render(facts))
        return 0
    from megatron_ettin.data.dataset import open_dataset

    if not is_dataset:
        raise UserError(f"{path}: no dataset (manifest.json), checkpoint (integrity.json) or run (config.yaml)")
    verified = verify(path, args.json) if args.verify else None
    dataset = open_dataset(path)
    content = describe_dataset(dataset, verified)
    content["samples"] = samples(dataset, args.sample)
    if args.json:
        print(printable_json(content))
    else:
        print_dataset(content)
    return 0


def verify(path: Path, as_json: bool = False) -> Verified:
    """Check every byte of a dataset, its packing indices and orders. Raises UserError for a damaged file."""
    from megatron_ettin.data.verify import dataset_files, unlisted_files, verify_files

    verified = verify_files([*dataset_files(path), *unlisted_files(path), *unlisted_files(path / "heldout")])
    if verified.problems:
        if as_json:
            answer = {"verified": False, "verification": str(verified), "problems": verified.problems}
            print(json.dumps(answer, indent=1))
        for problem in verified.problems if len(verified.problems) > 1 else ():
            print(problem, file=sys.stderr)
        more = f", and {len(verified.problems) - 1} more" if len(verified.problems) > 1 else ""
        counts = f"{len(verified.problems)} of {verified.files} files"
        raise UserError(f"{counts} are not as recorded: {verified.problems[0]}{more}")
    return verified


def describe_dataset(dataset: Dataset, verified: Verified | None) -> dict[str, Any]:
    """Return the facts about a dataset that `--json` prints, without samples. `verified` is None without --verify."""
    from megatron_ettin.data.packing_index import existing_packing_indices

    plans = existing_packing_indices(dataset)
    manifest = asdict(dataset.manifest)
    shards = [
        {
            "name": shard.name,
            "documents": shard.documents,
            "chunks": shard.chunks,
            "tokens": shard.tokens,
            "bytes": sum(file.bytes for file in shard.files.values()),
        }
        for shard in dataset.manifest.shards
    ]
    rows = [
        {"batching": p.batching, "seq_len": p.seq_len, "rows": p.num_rows, "tokens": p.num_tokens, "fill": p.fill}
        for p in plans
    ]
    dropped = ("tokenizer_files", "settings_sha256", "format", "version")
    kept = {key: value for key, value in manifest.items() if key not in dropped}
    content = {"kind": "dataset", "path": str(dataset.path), **kept, "shards": shards, "rows": rows}
    return {**content, "verified": verified is not None, "verification": str(verified) if verified else None}


def samples(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Return `count` decoded chunks spread over the dataset, the same in each call, with their documents."""
    if not count:
        return []
    import numpy as np

    from megatron_ettin.data.hashing import Permutation
    from megatron_ettin.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(dataset.path / "tokenizer")
    shown = []
    for chunk in Permutation(dataset.num_chunks, SAMPLE_SEED)(np.arange(min(count, dataset.num_chunks))).tolist():
        source, document, start, _ = dataset.document_of(chunk)
        tokens = dataset.chunk(chunk)
        where = {"chunk": chunk, "source": source, "document": document, "start_token": start, "tokens": len(tokens)}
        shown.append({**where, "text": tokenizer.decode(tokens.tolist())})
    return shown


def print_dataset(content: dict[str, Any]) -> None:
    """Print the facts of `describe_dataset`, and the samples, as text."""
    tokenizer = content["tokenizer"]
    print(f"dataset {printable(content['path'])}  fingerprint {content['fingerprint'][:16]}")
    counts = ", ".join(f"{content[key]:,} {key}" for key in ("documents", "chunks", "tokens"))
    print(f"  {counts} ({content['dtype']})")
    rule = f"up to {content['chunk_tokens']} tokens, last pieces under {content['skip_tokens']} dropped"
    print(f"  chunks: {rule}, under {content['min_chunk_tokens']} filled up")
    size, fingerprint = f"{tokenizer['vocab_size']:,} tokens", tokenizer["fingerprint"][:16]
    print(f"  tokenizer: {printable(tokenizer['name'])}, {size}, fingerprint {fingerprint}")
    table("sources", ("name", "documents", "chunks", "tokens"), content["sources"], SOURCES_SHOWN)
    table("shards", ("name", "documents", "chunks", "tokens", "bytes"), content["shards"], SHARDS_SHOWN)
    plans = [{**plan, "fill": f"{plan['fill']:.2%}"} for plan in content["rows"]]
    table("packing indices", ("batching", "seq_len", "rows", "tokens", "fill"), plans, SHARDS_SHOWN)
    if content["verified"]:
        print(f"  verified: every file has its recorded sha256; {content['verification']}")
    for sample in content["samples"]:
        document = f"{printable(sample['source'])} {printable(sample['document'])}"
        span = f"{document} from token {sample['start_token']}, {sample['tokens']} tokens"
        print(f"--- chunk {sample['chunk']}: {span}\n{printable(sample['text'], KEPT_OF_TEXTS)}")


def table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]], limit: int) -> None:
    """Print a table of at most `limit` rows and a count of the rest."""
    if not rows:
        return
    cells = [[f"{row[c]:,}" if isinstance(row[c], int) else printable(row[c]) for c in columns] for row in rows[:limit]]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    print(f"  {title}:")
    for line in [list(columns), *cells]:
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("    " + "  ".join([line[0].ljust(widths[0]), *rest]))
    if len(rows) > limit:
        print(f"    ... and {len(rows) - limit:,} more")
