"""A report that follows its runs: served on this machine only, asked for news by the page itself."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.secrets import masked
from megatron_ettin.report.document import Report, render

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
