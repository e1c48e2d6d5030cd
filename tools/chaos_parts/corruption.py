"""Change single bytes of a dataset or a run: each change is detected and named, or changes nothing that is read.

A byte of a file gets another value; the file is chosen by type, so that small files come up as often as large ones.
`ettin inspect PATH --verify` must exit with 2 and name the file, or the file that holds its digest. An accepted change
must leave equal content for every reader (JSON and YAML). After a change of `latest` a run must still find a complete
checkpoint. Files are restored afterwards. An attempt is a function of seed and number, and the report names both.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import random
from pathlib import Path


def file_type(path: Path) -> str:
    """Return a file's type: its suffix, or its name if it has none."""
    name = path.name
    return path.suffix if path.suffix in (".distcp", ".bin", ".idx", ".arrow", ".npy", ".pt") else name


def files_of(folder: Path) -> dict[str, list[Path]]:
    """Return the protected files: a run's checkpoints, or a dataset without the notes on how it was made."""
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    by_type = collections.defaultdict(list)
    for path in sorted(inside.rglob("*")):
        if path.is_file() and path.stat().st_size:
            by_type[file_type(path)].append(path)
    return by_type


def verified(folder: Path) -> tuple[int, str]:
    """Return status and output of `ettin inspect --verify`."""
    from megatron_ettin.cli.main import main as ettin

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = ettin(["inspect", str(folder), "--verify"])
    return status, out.getvalue()


def same_content(path: Path, before: bytes, after: bytes) -> bool:
    """Return whether two texts of JSON or YAML hold equal values."""
    import yaml

    if path.suffix not in (".json", ".yaml"):
        return False
    load = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return load(before.decode()) == load(after.decode())
    except (ValueError, yaml.YAMLError):
        return False


def attempt(folder: Path, path: Path, before: bytes, draw: random.Random) -> tuple[str, str]:
    """Change one byte and return ("named" | "harmless" | "missed", details)."""
    from megatron_ettin.checkpoint.directory import latest

    after = bytearray(before)
    at = draw.randrange(len(after))
    after[at] = draw.choice([value for value in range(256) if value != before[at]])
    path.write_bytes(after)
    try:
        what = f"{path}: byte {at} from {before[at]:#04x} to {after[at]:#04x}"
        if path.name == "latest":
            checkpoint = latest(folder, checksums=True)
            return ("named", "") if checkpoint is not None and checkpoint.is_dir() else ("missed", what)
        target = path.parent if (path.parent / "integrity.json").exists() else folder
        status, output = verified(target)
        if status == 2 and (path.name in output or path.parent.name in output):
            return "named", ""
        harmless = status == 0 and same_content(path, before, bytes(after))
        return ("harmless", what) if harmless else ("missed", f"{what}: status {status}, {output.strip()[-300:]}")
    finally:
        path.write_bytes(before)


def corrupt(args: argparse.Namespace) -> int:
    table: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: dict.fromkeys(("named", "harmless", "missed"), 0)
    )
    missed = []
    groups = [(folder, type_name, paths) for folder in args.paths for type_name, paths in files_of(folder).items()]
    for number in range(args.count):
        draw = random.Random(f"{args.seed} {number}")
        folder, type_name, paths = groups[number % len(groups)]
        path = draw.choice(paths)
        outcome, details = attempt(folder, path, path.read_bytes(), draw)
        table[type_name][outcome] += 1
        if outcome == "missed":
            missed.append(f"seed {args.seed} number {number}: {details}")
    report(args, table, missed)
    return int(bool(missed))


def report(args: argparse.Namespace, table: dict[str, dict[str, int]], missed: list[str]) -> None:
    if args.json:
        print(json.dumps({"kinds": table, "missed": missed}))
        return
    print(f"{'kind':<28}{'named':>8}{'harmless':>10}{'missed':>8}")
    for type_name, counts in sorted(table.items()):
        print(f"{type_name:<28}{counts['named']:>8}{counts['harmless']:>10}{counts['missed']:>8}")
    print(*missed, sep="\n", end="\n" if missed else "")
