"""Check whether this machine is fit to train, what is missing, and what that costs.

It looks at versions, GPUs, file systems, limits, names and clocks, and checks the results of some seconds of matrix
products and all-reduces.

Each line is ok, a note, a warning (costs speed, or may end a run one day) or a problem (a run would stop, or
compute something else). Warnings and problems say what to do. Exit status: 0, 1 if there is a problem, 2 for wrong
arguments.

Examples:
  ettin doctor
  ettin doctor --path data runs --json
  ettin doctor --quick --gpus 8          # in a prolog or health check: nothing is measured, a few seconds
  torchrun --nproc-per-node 2 --no-python ettin doctor --ranks
  srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 ettin doctor --ranks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.doctor.findings import Finding
    from megatron_ettin.parallel.env import DistributedEnv

# after a problem with one of these the later checks cannot run
NO_FURTHER = ("megatron-core", "torch", "first host")
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    path = "file systems to test: where runs and data are (default: here)"
    add("--path", nargs="+", type=Path, metavar="DIR", help=path)
    gpus = "report a problem unless torch sees so many GPUs here"
    add("--gpus", type=int, at_least=0, metavar="N", help=gpus)
    add("--ranks", action="store_true", help="compare all ranks of this torchrun or srun")
    add("--quick", action="store_true", help="skip what takes seconds: speeds, products, imports")
    add("--json", help="print one object")


def run(args: argparse.Namespace) -> int:
    """Check this machine, print the findings, and return 1 if one is a problem, else 0."""
    from megatron_ettin.doctor.findings import worst
    from megatron_ettin.parallel.env import read_distributed_env

    began = time.monotonic()
    env = read_distributed_env()
    if args.ranks and env.world == 1:
        how = "`torchrun --nproc-per-node N --no-python ettin doctor --ranks`, or srun in a job"
        raise UserError(f"--ranks: needs several ranks, and this is one alone; start them with {how}")
    if not args.ranks and env.local_rank > 0:
        # only the first rank of each host reports
        return 0
    with warnings.catch_warnings():
        # libraries warn of missing packages, which the findings report
        warnings.simplefilter("ignore")
        findings = collect(args, env)
    met = any(finding.name == "rendezvous" and finding.state == "ok" for finding in findings)
    if env.rank == 0 or not args.ranks:
        show(findings, args.json, time.monotonic() - began)
    elif not met:
        show([finding for finding in findings if finding.state == "problem"], False, 0.0)
    return 1 if worst(findings) == "problem" else 0


def collect(args: argparse.Namespace, env: DistributedEnv) -> list[Finding]:
    """Return the findings of this rank, then of all ranks (collective with --ranks)."""
    from megatron_ettin.doctor.accelerator import accelerator_findings
    from megatron_ettin.doctor.files import file_findings
    from megatron_ettin.doctor.host import host_findings
    from megatron_ettin.doctor.versions import version_findings

    findings = version_findings()
    findings += accelerator_findings(args.quick, args.gpus)
    findings += host_findings()
    if env.local_rank == 0:
        # ranks of a host that measure at the same time would slow each other down
        for folder in dict.fromkeys(args.path or [Path(".")]):
            findings += file_findings(folder, args.quick)
    broken = any(finding.state == "problem" and finding.name in NO_FURTHER for finding in findings)
    if broken or (args.quick and not args.ranks):
        return findings
    from megatron_ettin.doctor.ranks import rank_findings, single_rank_findings
    from megatron_ettin.platform import detect

    if not args.ranks:
        return findings + single_rank_findings()
    return findings + rank_findings(env, detect("auto", env.local_rank), findings, args.quick)


def show(findings: list[Finding], as_json: bool, seconds: float) -> None:
    """Print the findings: an object for scripts, a table on a terminal, plain lines elsewhere."""
    from megatron_ettin.base.versions import code_version
    from megatron_ettin.doctor.findings import count_states, worst

    if as_json:
        answer = {"host": socket.gethostname(), "version": code_version(), "state": worst(findings), "seconds": seconds}
        print(json.dumps({**answer, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=1))
        return
    last = f"{socket.gethostname()}: {count_states(findings)}" + (f" ({seconds:.1f} s)" if seconds else "")
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        draw(findings, last)
        return
    for finding in findings:
        todo = f" -> {finding.todo}" if finding.todo else ""
        print(f"{finding.state:<8} {finding.name}: {finding.text}{todo}")
    print(last, flush=True)


def draw(findings: list[Finding], last: str) -> None:
    """Print the findings as a table for a terminal, and the line `last` below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "what", "found", box=None)
    for finding in findings:
        text = Text(finding.text)
        if finding.todo:
            text.append(f"\n-> {finding.todo}", style="bold")
        table.add_row(Text(finding.state, style=STYLES[finding.state]), Text(finding.name), text)
    console = Console()
    console.print(table)
    console.print(Text(last, style="bold"))
