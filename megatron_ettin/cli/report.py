"""Write one page of a run, of all its phases, or of a pair: curves to zoom into, data consumed, restarts, bad steps,
checkpoints, configuration. It is one file that opens from disk; --watch serves it live on this machine.

    ettin report runs/17m-mlm
    ettin report runs/17m-mlm runs/17m-clm --out pair.html --svg figures
    ettin report runs/17m-mlm --watch
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.report.document import Report

DEFAULT_PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of their phases")
    parser.add_argument(
        "--out", type=Path, metavar="REPORT.html", help="the page to write (RUN/report/report.html of the first)"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write every chart as a PNG")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="also write every chart as an SVG")
    parser.add_argument("--title", help="title of the page, in place of the models' names")
    parser.add_argument(
        "--release", type=Path, action="append", default=[], metavar="DIR",
        help="an output of `ettin release` whose parity to show (those in the runs and next to them are found)",
    )  # fmt: skip
    parser.add_argument(
        "--watch", nargs="?", type=port, const=DEFAULT_PORT, metavar="PORT",
        help=f"serve the page on this machine (port {DEFAULT_PORT}; 0: a free one) and follow the runs until Ctrl-C",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def port(text: str) -> int:
    """Return a port number. Raises argparse's error, which explains a run written after --watch."""
    if not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535; runs stand before --watch")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from megatron_ettin.report import document

    for folder in args.release:
        if not (folder / "release.json").is_file():
            raise UserError(f"--release {folder}: not an output of `ettin release` (it has no release.json)")
    if args.watch is not None:
        return watch(args)
    out = args.out or args.runs[0] / "report" / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: a page is written, so its name must end in .html")
    report = document.make(args.runs, args.title, args.release)
    written = write(report, out, args.png, args.svg)
    show(report, written, args.json)
    return 0


def write(report: Report, out: Path, png: Path | None, svg: Path | None) -> Sequence[Path]:
    """Write the page and the figures, and return their paths. Raises UserError."""
    from megatron_ettin.report import document, plots

    written = [out]
    name: str | Path = f"--out {out}"
    try:
        document.write(out, document.render(report).encode())
        for folder, form in ((png, "png"), (svg, "svg")):
            if folder is None:
                continue
            name = f"--{form} {folder}"
            for file, content in plots.figures(report.models, form):
                document.write(folder / file, content)
                written.append(folder / file)
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror or error})") from None
    return written


def show(report: Report, written: Sequence[Path], as_json: bool) -> None:
    """Print what was written."""
    page, *figures = written
    if not as_json:
        print(f"{report.verdict}: " * (report.verdict is not None) + " / ".join(model.name for model in report.models))
        print(f"{page}, {page.stat().st_size:,} bytes")
        for path in figures:
            print(path)
        return
    models = [
        {
            "name": model.name,
            "runs": [str(one.path) for one in model.runs],
            "phases": model.phases,
            "steps": sum(len(one.metrics.steps) for one in model.runs),
            "tokens": sum(one.tokens for one in model.runs),
        }
        for model in report.models
    ]
    answer = {"page": str(page), "bytes": page.stat().st_size, "figures": list(map(str, figures))}
    print(json.dumps({**answer, "verdict": report.verdict, "models": models}, indent=1))


def watch(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Raises UserError."""
    from megatron_ettin.report import document

    for option in ("out", "png", "svg"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option}: nothing is written with --watch; run the command again without it")
    source = document.ReportSource(lambda: document.make(args.runs, args.title, args.release))
    # raises what is wrong with the runs before the server starts
    source.newest()
    served = document.server(source, args.watch)
    print(f"http://{document.HOST}:{served.server_address[1]}/ until Ctrl-C", flush=True)
    try:
        served.serve_forever()
    except KeyboardInterrupt:
        print("ettin report: no longer served", flush=True)
    finally:
        served.server_close()
    return 0
