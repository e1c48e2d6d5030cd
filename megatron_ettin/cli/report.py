"""Write one page of a run, of all its phases, or of a pair.

It has curves to zoom into, data consumed, restarts, bad steps, checkpoints and configuration, in one file that opens
from disk; --watch serves it live on this machine.

    ettin report runs/17m-mlm
    ettin report runs/17m-mlm runs/17m-clm --out pair.html --svg figures
    ettin report runs/17m-mlm --watch
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError

if TYPE_CHECKING:
    from megatron_ettin.report.document import Report

DEFAULT_PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of their phases")
    add("--out", type=Path, metavar="REPORT.html", help="the page to write (RUN/report/report.html of the first)")
    add("--png", type=Path, metavar="DIR", help="also write every chart as a PNG")
    add("--svg", type=Path, metavar="DIR", help="also write every chart as an SVG")
    add("--title", help="title of the page, in place of the models' names")
    release = "an output of `ettin release` whose parity to show (those in the runs and next to them are found)"
    add("--release", type=Path, action="append", default=[], metavar="DIR", help=release)
    watch = f"serve the page on this machine (port {DEFAULT_PORT}; 0: a free one) and follow the runs until Ctrl-C"
    add("--watch", nargs="?", type=port, const=DEFAULT_PORT, metavar="PORT", help=watch)
    add("--json", help="print what was written as JSON")


def port(text: str) -> int:
    """Return a port number. Raises ArgumentTypeError, whose message covers a run written after --watch."""
    if not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535; runs stand before --watch")
    return int(text)


def check_page(out: Path) -> None:
    """Raise UserError if the page's name does not end in .html or .htm."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: a page is written, so its name must end in .html")


def write_pages(pages: Iterable[tuple[str, Path, bytes]]) -> list[Path]:
    """Write (option, path, content) files and return their paths. Raises UserError, which names the option."""
    from megatron_ettin.report import document

    written = []
    for option, path, content in pages:
        try:
            document.write(path, content)
        except OSError as error:
            raise UserError(f"{option}: cannot be written ({error.strerror or error})") from None
        written.append(path)
    return written


def run(args: argparse.Namespace) -> int:
    """Write the page and its figures and print their paths, or serve the page; return 0."""
    from megatron_ettin.report import document, plots

    for folder in args.release:
        if not (folder / "release.json").is_file():
            raise UserError(f"--release {folder}: not an output of `ettin release` (it has no release.json)")
    if args.watch is not None:
        return watch(args)
    out = args.out or args.runs[0] / "report" / "report.html"
    check_page(out)
    report = document.make(args.runs, args.title, args.release)

    def pages() -> Iterator[tuple[str, Path, bytes]]:
        yield f"--out {out}", out, document.render(report).encode()
        for form, folder in (("png", args.png), ("svg", args.svg)):
            for name, content in plots.figures(report.models, form) if folder is not None else ():
                yield f"--{form} {folder}", folder / name, content

    show(report, write_pages(pages()), args.json)
    return 0


def show(report: Report, written: Sequence[Path], as_json: bool) -> None:
    """Print the models of the page and the written files. The first path is the page, the others are figures."""
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
    """Serve the page until Ctrl-C and return 0. Raises UserError."""
    from megatron_ettin.report import document

    for option in ("out", "png", "svg"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option}: nothing is written with --watch; run the command again without it")
    source = document.ReportSource(lambda: document.make(args.runs, args.title, args.release))
    # reports mistakes in the runs before the server starts
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
