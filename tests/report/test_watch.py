"""`ettin report --watch` serves the page and its updates to this host only."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from megatron_ettin.report import document
from tests.forkserver import program
from tests.report.synthetic import write_run

STEP_41 = '{"step": 41, "tokens": 2700000, "loss": 3.25, "lr": 0.001}\n'


@contextmanager
def served(run: Path) -> Iterator[tuple[int, document.ReportSource]]:
    """Serve the page of one run while the body runs; yield (port, source of the page)."""
    source = document.ReportSource(lambda: document.make([run]))
    server = document.server(source, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1], source
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer_of(port: int, path: str, host: str = "") -> tuple[int, str]:
    """Return status and text of the answer to a GET request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def look_again(source: document.ReportSource) -> None:
    """Make the source read its runs again at the next request, without waiting."""
    source._next = 0.0


def test_watch_server_sends_page_then_only_changes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with served(run) as (port, source):
        status, page = answer_of(port, "/")
        assert status == 200
        assert "connect-src 'self'" in page
        (version,) = re.findall(r'data-live="2000" data-version="(\d+)"', page)
        assert answer_of(port, f"/data.json?seen={version}") == (204, "")
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(STEP_41)
        look_again(source)
        status, text = answer_of(port, f"/data.json?seen={version}")
        news = json.loads(text)
        assert status == 200
        assert news["version"] != version
        assert news["data"]["models"][0]["runs"][0]["n"] == 41
        assert "41" in news["sections"]["cards"]
        assert set(news["sections"]) >= {"checkpoints", "environment"}
        assert answer_of(port, f"/data.json?seen={news['version']}")[0] == 204
        # if a run cannot be read, the last page stays
        (run / "config.yaml").write_text("run: {")
        look_again(source)
        assert answer_of(port, f"/data.json?seen={news['version']}")[0] == 204


def test_watch_server_foreign_host_or_path_is_refused(tmp_path: Path) -> None:
    with served(write_run(tmp_path / "run", steps=3)) as (port, _):
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil"):
            assert answer_of(port, "/data.json", host)[0] == 403
        for host in ("localhost", f"localhost:{port}", "127.0.0.1"):
            assert answer_of(port, "/", host)[0] == 200
        for path in ("/../config.yaml", "/config.yaml", "/%2e%2e/"):
            assert answer_of(port, path)[0] == 404


def test_watch_port_in_use_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["report", str(run), "--watch", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--watch {port}: Address already in use; name another port" in error
    assert error.count("\n") == 1


def test_watch_command_serves_until_sigint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    arguments = program("ettin", "report", str(run), "--watch", "0")
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs ignore it
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout is not None
    address = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ until Ctrl-C\n", process.stdout.readline())
    assert address is not None
    assert answer_of(int(address[1]), "/")[0] == 200
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "no longer served" in out
