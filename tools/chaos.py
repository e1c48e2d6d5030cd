"""Inject faults and prove that they change nothing: runs end with the bits of an undisturbed run, or stop with an error
that names the damage.

  python tools/chaos.py run [--rounds 10] [--seed 1] [--log chaos.jsonl]  kill -9, stops, signals, full disks, damage,
                                                                          network drops, clock changes: whole runs
  python tools/chaos.py cut [--what publish|training] [--every 1]         a save killed at every call that changes disk
  python tools/chaos.py corrupt PATH... [--count 500]                     single bytes of a dataset or a run

`run` continues where its log ends; a round is a function of seed and number. The exit status is 1 if anything went
wrong silently: a difference, damage, a torn checkpoint. Faults that this host cannot make are listed in lines that
begin with `left out`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# tests/ has the corpus
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

FAULTS = "kill,stop,term,disk,corrupt,network,clock"


def parser_of_all() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one: Any = parts.add_parser("run", help="whole runs under faults")
    one.add_argument("--rounds", type=int, default=10)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--only", type=int, metavar="ROUND", help="this round alone, without the log")
    one.add_argument("--ranks", type=int, default=4)
    one.add_argument("--faults", default=FAULTS, help="kinds, with commas between")
    one.add_argument("--layouts", default="tp2 pp2,tp2 dp2,dp4", help="of the ranks, with commas between")
    one.add_argument(
        "--log", type=Path, help="JSON lines, one a round; go on where it ends (default: WORK/chaos.jsonl)"
    )
    one.add_argument("--mutation", help="of tests/mutations.py, in every disturbed run: has to be found")
    one.set_defaults(run=run_rounds)
    one = parts.add_parser("cut", help="a save killed at every call that changes the disk")
    one.add_argument("--what", choices=("publish", "training"), default="publish")
    one.add_argument("--every", type=int, default=1, help="of so many cuts one")
    one.add_argument("--mutation", help="of tests/mutations.py, in what is cut: has to be found")
    one.set_defaults(run=run_cuts)
    for part in parts.choices.values():
        part.add_argument("--work", type=Path, help="folder for runs (default: a temporary one)")
    one = parts.add_parser("corrupt", help="single bytes of a dataset or a run")
    one.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    one.add_argument("--count", type=int, default=500)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--json", action="store_true")
    one.set_defaults(run=run_corrupt)
    return parser


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as room:
            yield Path(room)


def run_rounds(args: argparse.Namespace) -> int:
    from chaos_parts import rounds

    with workplace(args.work) as work:
        names, layouts = args.faults.split(","), args.layouts.split(",")
        with rounds.Chaos(work, args.ranks, names, layouts, args.mutation) as chaos:
            for name, why in chaos.unavailable.items():
                print(f"left out: {name}: {why}", flush=True)
            if args.only is not None:
                done = [chaos.round(args.seed, args.only)]
                print(*done[0].events, done[0].launches, done[0].outcome, sep="\n")
            else:
                done = rounds.run(args.log or work / "chaos.jsonl", chaos, args.seed, args.rounds)
    return rounds.report(done)


def run_cuts(args: argparse.Namespace) -> int:
    from chaos_parts import cutting

    with workplace(args.work) as work:
        return cutting.run(work, args.what, args.every, args.mutation)


def run_corrupt(args: argparse.Namespace) -> int:
    from chaos_parts import corruption

    return corruption.corrupt(args)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_all()
    args = parser.parse_args(argv)
    for path in getattr(args, "paths", ()):
        if not path.is_dir():
            parser.error(f"{path}: no such folder")
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
