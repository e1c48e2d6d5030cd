"""The page of a run or of several: curves that can be zoomed, and what is known of the run. One file, no network.

Its policy lets the browser run this script and use this style sheet only, whatever a file of the run holds.

A report that follows its runs: served on this machine only, asked for news by the page itself."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from megatron_ettin import __version__
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.text import masked
from megatron_ettin.report import compare, sections
from megatron_ettin.report.facts import embedded, escaped
from megatron_ettin.report.models import Model, read_models
from megatron_ettin.report.series import page_data

HERE = Path(__file__).parent
KEYS_HELP = (
    "Drag over a chart to zoom in, double-click for everything; the wheel zooms after a click, or with Ctrl. On a"
    " focused chart: + and - zoom, arrows move, Shift with arrows reads values, 0 shows everything."
    " Flags: a restart; triangles on the floor: a bad step; triangles at the top: values above the axis. Dots: each"
    " point, where there are few. Smoothing is a running median; what was measured stands paler behind it."
)


@dataclass(frozen=True)
class Report:
    """What a page says: its numbers, and its parts by the id of their element."""

    title: str
    models: list[Model]
    data: dict[str, Any]
    parts: dict[str, str]
    verdict: str | None


def make(paths: Sequence[Path], title: str | None = None, releases: Sequence[Path] = ()) -> Report:
    """Read the runs. Raises UserError for a path that is no run."""
    models = read_models(paths)
    compared = _compared(models)
    parts = {
        "cards": sections.cards(models),
        "comparison": sections.comparison(compared),
        "data-consumed": sections.data(models),
        "layout": sections.layout(models),
        "environment": sections.environment(models),
        "bad-steps": sections.bad_steps(models),
        "checkpoints": sections.checkpoints(models, releases),
        "configuration": sections.configuration(models),
    }
    named = title or " / ".join(model.name for model in models)
    verdict = compared.verdict if isinstance(compared, compare.Comparison) else None
    return Report(named, models, page_data(models), parts, verdict)


def _compared(models: Sequence[Model]) -> compare.Comparison | str | None:
    """The verdict on several models, or why there is none."""
    if len(models) < 2:
        return None
    try:
        return compare.compare([run.path for model in models for run in model.runs if len(run.metrics.steps)])
    except UserError as error:
        return str(error)


def render(report: Report, live: tuple[int, str] | None = None) -> str:
    """The page. `live`: milliseconds between questions to the server, version of the numbers."""
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("run_page.js", "run_page.css"))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'"
    policy += f"; form-action 'none'; connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}"
    told = "\n".join(f'<section id="{name}">{part}</section>' for name, part in report.parts.items() if name != "cards")
    polling = f' data-live="{live[0]}" data-version="{live[1]}"' if live else ""
    state = '<span id="live" role="status" class="good">live</span>' if live else '<span id="live" hidden></span>'
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<title>{escaped(report.title)}</title><style>{style}</style></head><body{polling}>
<a class="skip" href="#curves">Skip to the curves</a>
<header><div><h1>{escaped(report.title)}</h1><p class="soft">ettin report {__version__}, {when} {state}</p></div>
<button type="button" id="theme">Colours: auto</button></header>
<main>
<section id="cards">{report.parts["cards"]}</section>
<section id="curves" tabindex="-1" aria-label="Curves"><h2>Curves</h2>
<noscript><p class="bad">Scripts are switched off, so that no curve is drawn. The tables are complete.</p></noscript>
<p class="soft" id="empty"{" hidden" if report.data["charts"] else ""}>No step is recorded yet.</p>
<div class="bar" id="bar" role="toolbar" aria-label="Range of the curves" hidden>
<label for="axis">Against</label><select id="axis"></select>
<label for="smooth">Smoothing</label><input type="range" id="smooth" min="0" max="100" value="20">
<button type="button" id="in" aria-label="zoom in">+</button>
<button type="button" id="out" aria-label="zoom out">&minus;</button>
<button type="button" id="reset" disabled>Show everything</button>
<span class="soft">Shown: <span id="range">all</span></span></div>
<p class="soft" id="keys">{KEYS_HELP}</p>
<p class="sr" id="said" aria-live="polite"></p>
<div class="charts" id="charts"></div></section>
{told}
</main>
<script type="application/json" id="data">{embedded(report.data)}</script>
<script>{script}</script></body></html>
"""


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def write(path: Path, content: bytes) -> None:
    """The file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


HOST = "127.0.0.1"
POLL_MILLISECONDS = 2_000
IDLE_SHARE = 10  # of its time at most one tenth goes into reading the runs again


class Source:
    """The newest report, made when it is asked for and at most so often."""

    def __init__(self, make: Callable[[], Report]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._report: Report | None = None
        self._version, self._next = 0, 0.0

    def newest(self) -> tuple[Report, str]:
        """The report and its version. While the runs cannot be read, the last one that could be."""
        with self._lock:
            began = time.monotonic()
            if self._report is None or began >= self._next:
                try:
                    report = self._make()
                except (UserError, OSError):
                    if self._report is None:
                        raise
                    report = self._report
                if self._report is None or (report.data, report.parts) != (self._report.data, self._report.parts):
                    self._report, self._version = report, self._version + 1
                self._next = time.monotonic() + max(1.0, IDLE_SHARE * (time.monotonic() - began))
            return self._report, str(self._version)


def server(source: Source, port: int) -> ThreadingHTTPServer:
    """Raises UserError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """The page, or its news."""
            named = (self.headers.get("Host") or "").partition(":")[0]
            if named not in (HOST, "localhost"):  # another site's name that was pointed to this machine
                return self.send_error(403)
            url = urlsplit(self.path)
            if url.path not in ("/", "/data.json"):
                return self.send_error(404)
            report, version = source.newest()
            if url.path == "/":
                return self._answer("text/html", render(report, (POLL_MILLISECONDS, version)))
            if parse_qs(url.query).get("seen") == [version]:
                return self._answer("application/json", "", 204)
            news = {"version": version, "title": masked(report.title), "data": report.data, "sections": report.parts}
            return self._answer("application/json", json.dumps(news, allow_nan=False))

        def _answer(self, kind: str, text: str, status: int = 200) -> None:
            content = text.encode()
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Nothing: a line every two seconds tells nobody anything."""

    try:
        served = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--watch {port}: {error.strerror or error}; name another port") from None
    served.daemon_threads = True
    return served
