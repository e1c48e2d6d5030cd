"""Feed damaged and hostile files to every reader of external files: each must be read, or refused in one line.

  python tools/fuzz.py [--runs 20000] [--reader idx,yaml] [--seed 1] [--out DIR]

Each reader works in a process of its own with 1 GiB of memory above what it starts with. A failure is any error but
UserError, an input that takes more than five seconds, a dead process, or code that a file made run (os.system, a class
outside of a reader's list); its files are left in --out with the error. An input is a function of reader, seed and
number: `--reader idx --seed 1 --first 4711 --runs 1` makes one again. Exit status 1 on a failure.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzzing.readers import READERS, Reader

MEMORY_BYTES = 1 << 30
SLOW_SECONDS = 5
# fewer runs of slow readers
WEIGHTS = {"yaml": 0.2, "compare": 0.05, "report": 0.05, "status": 0.2}
# a reader stops after this many
MOST_FAILURES = 5
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree")


class Ran(BaseException):
    """Raised when a file made a reader run code."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in FORBIDDEN:
        raise Ran(f"{event}{arguments!r:.200}")


def slow(number: int, frame: Any) -> None:
    raise Ran(f"more than {SLOW_SECONDS} s")


def run_reader(name: str, runs: int, first: int, seed: int, out: str) -> dict[str, Any]:
    """Run one reader in this process; return counts and failures."""
    reader = READERS[name]
    logging.disable(logging.CRITICAL)
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="ettin-fuzz-", dir=base))
    targets = reader.make(folder)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    # read good files first, so that everything is imported before memory is limited
    reader.read(folder)
    limit_memory()
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, slow)
    counts: dict[str, Any] = {"reader": name, "executions": 0, "refused": 0, "accepted": 0, "failures": []}
    began = time.perf_counter()
    for number in range(first, first + runs):
        draw = random.Random(f"{name} {seed} {number}")
        target = draw.choice(targets)
        damaged = reader.mutate(draw, contents[target], [contents[one] for one in targets[::-1]])
        (folder / target).write_bytes(damaged)
        outcome, error = one_execution(reader, folder)
        counts["executions"] += 1
        if outcome == "failure":
            counts["failures"].append(keep(out, name, number, target, damaged, error))
        else:
            counts[outcome] += 1
        (folder / target).write_bytes(contents[target])
        if len(counts["failures"]) >= MOST_FAILURES:
            break
    counts["seconds"] = time.perf_counter() - began
    counts["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return counts


def one_execution(reader: Reader, folder: Path) -> tuple[str, str]:
    """Return ("accepted", "refused" or "failure", the failure's text)."""
    from megatron_ettin.base.errors import UserError

    signal.alarm(SLOW_SECONDS)
    try:
        reader.read(folder)
        return "accepted", ""
    except UserError as error:
        several = len(str(error).splitlines()) > 1
        return ("failure", f"several lines: {error}") if several else ("refused", "")
    except (Exception, Ran):
        return "failure", traceback.format_exc()
    finally:
        signal.alarm(0)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def keep(out: str, name: str, number: int, target: str, content: bytes, error: str) -> str:
    """Save a failing input and return the error's last line."""
    folder = Path(out) / f"{name}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / target).write_bytes(content)
    (folder / "error.txt").write_text(error)
    return f"{folder}: {error.strip().splitlines()[-1][:300]}"


def entry(pipe: Any, arguments: tuple[Any, ...]) -> None:
    pipe.send(run_reader(*arguments))


def fuzzed(name: str, runs: int, first: int, seed: int, out: str) -> dict[str, Any]:
    """Run `run_reader` in a process that may die."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=entry, args=(theirs, (name, runs, first, seed, out)))
    process.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        row = {"reader": name, "executions": 0, "refused": 0, "accepted": 0, "seconds": 0.0, "peak_bytes": 0}
        row["failures"] = [f"{name}: the process died with status {process.exitcode}"]
    process.join()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000, help="of all readers together")
    parser.add_argument("--reader", default=",".join(READERS), help="names with commas between")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = args.reader.split(",")
    for name in names:
        if name not in READERS:
            parser.error(f"--reader: {name!r} is none; they are {', '.join(READERS)}")
    rows = []
    for name in names:
        share = args.runs * WEIGHTS.get(name, 1.0) / sum(WEIGHTS.get(one, 1.0) for one in names)
        row = fuzzed(name, math.ceil(share), args.first, args.seed, str(args.out))
        rows.append(row)
        speed = row["executions"] / max(row["seconds"], 1e-9)
        if not args.json:
            print(
                f"{name:<12} {row['executions']:>9,} executions, {speed:>7,.0f} a second, {row['refused']:>9,} refused,"
                f" {row['accepted']:>8,} read, peak {row['peak_bytes'] >> 20:,} MiB, {len(row['failures'])} failures",
                flush=True,
            )
            print(*(f"  {failure}" for failure in row["failures"]), sep="\n", end="\n" if row["failures"] else "")
    failures = sum(len(row["failures"]) for row in rows)
    total = sum(row["executions"] for row in rows)
    print(json.dumps(rows) if args.json else f"{total:,} executions, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
