"""Make the HTML page of runs or of a comparison, and serve a page that follows its runs.

The page has curves that can be zoomed, and tables of facts about the runs. It is one file that needs no network. Its
content security policy allows only the page's own script and style sheet, so that text from a run's files cannot run.
A served page is reachable from this host only, and polls for changes.
"""

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
from string import Template
from typing import Any
from urllib.parse import parse_qs, urlsplit

from megatron_ettin import __version__
from megatron_ettin.base.errors import UserError
from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.text import masked
from megatron_ettin.report import sections
from megatron_ettin.report.compare import Comparison, compare_runs
from megatron_ettin.report.facts import embedded, escaped
from megatron_ettin.report.series import page_data
from megatron_ettin.runs.chain import PhaseChain, join_phases
from megatron_ettin.runs.directory import RunDirectory, find_runs

HERE = Path(__file__).parent
# a reader cannot distinguish more curves
MOST_MODELS = 12


@dataclass(frozen=True)
class Report:
    """Content of a page."""

    title: str
    models: list[PhaseChain]
    data: dict[str, Any]
    """Numbers that the page's script draws."""
    parts: dict[str, str]
    """Id of an element of the page -> its HTML."""
    verdict: str | None
    """Verdict of the comparison; None without one."""


def make(paths: Sequence[Path], title: str | None = None, releases: Sequence[Path] = ()) -> Report:
    """Return the page of the runs in `paths`, with a comparison of several models.

    Args:
        paths: run directories, or folders with run directories.
        title: title of the page; None: the names of the models.
        releases: release folders whose parity records are shown with the checkpoints.

    Raises:
        UserError: a path has no run directory, or there are too many models.
    """
    models = read_models(paths)
    return _report(models, _compared(models), title or " / ".join(model.name for model in models), releases)


def read_models(paths: Sequence[Path]) -> list[PhaseChain]:
    """Return the models of run directories and of folders with run directories. Raises UserError if a path has none."""
    runs: dict[Path, RunDirectory] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run directory")
        below = list(find_runs(path))
        if not below:
            raise UserError(f"{path}: no run directory (no config.yaml in it or in the folders below)")
        for run in below:
            runs.setdefault(run.resolve(), RunDirectory(run))
    models = join_phases(list(runs.values()), by_record=True)
    if len(models) > MOST_MODELS:
        raise UserError(f"{len(models)} models; one page shows at most {MOST_MODELS}: name fewer runs")
    return models


def make_comparison(comparison: Comparison) -> Report:
    """Return the page of a comparison, with its verdict in the title."""
    names = " / ".join(chain.name for chain in comparison.chains)
    return _report(comparison.chains, comparison, f"{comparison.verdict}: {names}", ())


def _report(
    models: list[PhaseChain], compared: Comparison | str | None, title: str, releases: Sequence[Path]
) -> Report:
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
    verdict = compared.verdict if isinstance(compared, Comparison) else None
    return Report(title, models, page_data(models), parts, verdict)


def _compared(models: Sequence[PhaseChain]) -> Comparison | str | None:
    """Compare several models, or return the reason why they cannot be compared."""
    if len(models) < 2:
        return None
    try:
        return compare_runs([run for model in models for run in model.runs if len(run.metrics.steps)])
    except UserError as error:
        return str(error)


def render(report: Report, live: tuple[int, str] | None = None) -> str:
    """Return the page as HTML. `live`: milliseconds between polls, and the content's version; None: not served."""
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("run_page.js", "run_page.css"))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'"
    policy += f"; form-action 'none'; connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}"
    state = '<span id="live" role="status" class="good">live</span>' if live else '<span id="live" hidden></span>'
    return Template((HERE / "run_page.html").read_text(encoding="utf-8")).substitute(
        policy=policy,
        title=escaped(report.title),
        style=style,
        polling=f' data-live="{live[0]}" data-version="{live[1]}"' if live else "",
        version=__version__,
        when=time.strftime("%Y-%m-%d %H:%M %Z"),
        state=state,
        cards=report.parts["cards"],
        empty_hidden=" hidden" if report.data["charts"] else "",
        sections="\n".join(
            f'<section id="{id_}">{html}</section>' for id_, html in report.parts.items() if id_ != "cards"
        ),
        data=embedded(report.data),
        script=script,
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def write(path: Path, content: bytes) -> None:
    """Write a file atomically, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


HOST = "127.0.0.1"
POLL_MILLISECONDS = 2_000
# reading takes at most one tenth of the time: wait this many times the duration of the last reading
IDLE_SHARE = 10


class ReportSource:
    """Cache of the report that makes it anew when it is requested, at most once a second."""

    def __init__(self, make: Callable[[], Report]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._report: Report | None = None
        self._version, self._next = 0, 0.0

    def newest(self) -> tuple[Report, str]:
        """Return the report and its version, which changes with the content; if reading fails, the previous report."""
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


def server(source: ReportSource, port: int) -> ThreadingHTTPServer:
    """Return a server of the page on HOST, not started. Raises UserError if the port cannot be used."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page, its new content as JSON, or 204 if the client has the newest."""
            named = (self.headers.get("Host") or "").partition(":")[0]
            # DNS rebinding: another site's name may resolve to this host
            if named not in (HOST, "localhost"):
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

        def _answer(self, media_type: str, text: str, status: int = 200) -> None:
            content = text.encode()
            # the client may have disconnected
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Type", f"{media_type}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Log nothing, because the page polls every two seconds."""

    try:
        served = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--watch {port}: {error.strerror or error}; name another port") from None
    served.daemon_threads = True
    return served
