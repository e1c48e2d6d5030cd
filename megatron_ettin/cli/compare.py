"""Prove that runs are a pair (same shape, data order, schedule, rows, tokens, updates) and draw their curves on a page.

Name the runs of an encoder and of a decoder; several phases of one model follow each other on the token axis.

    ettin compare runs/enc-pretrain runs/dec-pretrain --out pair.html
    ettin compare enc/pretrain enc/extend dec/pretrain dec/extend --out pair.html --json --require-paired

The verdict is PAIRED, NOT PAIRED (the differences are listed), SAME TRAINING (two runs of one objective that share
everything) or ONE MODEL (nothing to compare with). The page is that of `ettin report`; a PNG of the curves is written
next to it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ettin.cli.report import check_page, write_pages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories, phases in order; or folders of them")
    add("--out", type=Path, required=True, metavar="REPORT.html", help="the page to write")
    add("--json", help="print verdict, checks and figures as JSON")
    add("--require-paired", action="store_true", help="exit 1 where the verdict is NOT PAIRED")


def run(args: argparse.Namespace) -> int:
    """Compare the runs, write the page, print the verdict, and return the exit status."""
    from megatron_ettin.report import document, plots
    from megatron_ettin.report.compare import compare
    from megatron_ettin.runs.directory import phases_in

    out, picture = args.out, args.out.with_suffix(".png")
    check_page(out)
    # a folder of phases stands for all of its phases
    comparison = compare([phase for run in args.runs for phase in phases_in(run) or [run]])
    report = document.make_comparison(comparison)
    page = document.render(report).encode()
    write_pages([(f"--out {out}", picture, plots.overview(report.models)), (f"--out {out}", out, page)])
    if args.json:
        answer = {
            "verdict": comparison.verdict,
            "steps_without_partner": comparison.without_partner,
            "models": [chain.summary() for chain in comparison.chains],
            "checks": [vars(check) for check in comparison.checks],
            "page": str(out),
            "picture": str(picture),
        }
        print(json.dumps(answer, indent=1))
    else:
        for check in comparison.failed:
            print(f"differs: {check.name}{f' ({check.phase})' if check.phase else ''}: {check.detail}")
        notes = f" (updates left out: {comparison.left_out})" if comparison.left_out else ""
        if comparison.without_partner:
            notes += f" (steps without a partner: {comparison.without_partner})"
        print(f"{comparison.verdict}: {' / '.join(chain.name for chain in comparison.chains)}{notes}")
        print(f"{out} and {picture}")
    return 1 if args.require_paired and comparison.verdict == "NOT PAIRED" else 0
