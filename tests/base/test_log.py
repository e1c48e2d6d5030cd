"""base/log.py writes plain lines through a logger that users of the API can redirect."""

from __future__ import annotations

import logging

import pytest

from megatron_ettin.base import log


def test_log_writes_plain_lines_to_the_standard_streams(capsys: pytest.CaptureFixture[str]) -> None:
    log.log_info("100 % of", "it")
    log.log_warning("warning: {x}")
    log.log_exception(ValueError("why"))
    out, err = capsys.readouterr()
    assert out == "100 % of\nit\n"
    assert err == "warning: {x}\nValueError: why\n"


def test_log_with_user_handler_sends_lines_to_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    actual: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            actual.append(record)

    monkeypatch.setattr(logging.getLogger("megatron_ettin"), "handlers", [Handler()])
    log.log_info("one")
    log.log_warning("two")
    assert [(record.levelname, record.getMessage()) for record in actual] == [("INFO", "one"), ("WARNING", "two")]
    assert actual[0].module == "test_log"
    assert capsys.readouterr() == ("", "")


def test_log_error_in_user_handler_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the log's host is away")

    monkeypatch.setattr(logging.getLogger("megatron_ettin"), "handlers", [Broken()])
    log.log_warning("lost")
