"""Print what a run reports through the logger `megatron_ettin`; a line that cannot be written is lost.

A log's reader may end, its disk may be full, its terminal may be gone: none of that is a reason for a run of weeks to
end, or to end with another exit status. So everything that prints while a run trains uses this module
(tests/test_architecture.py checks it).

The logger's own handler writes plain lines: information to standard output, warnings and errors to standard error.
Whoever uses the package as a library replaces that handler to send the lines elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import IO, TextIO, cast

STANDARD_FILES = (0, 1, 2)
OUTPUT, ERRORS = 1, 2
SLOW_SECONDS = 5.0
NAMES = {OUTPUT: "standard output", ERRORS: "standard error"}

# numbers of the files that have failed, each of which is reported once
_failed: set[int] = set()


class StandardStreamsHandler(logging.Handler):
    """Writes messages to the current `sys.stdout` and `sys.stderr`, and never raises."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record without the handler's lock: a thread that hangs in a print must not stop the others."""
        if not self.filter(record):
            return False
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to standard output or, from a warning on, to standard error."""
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        _write(self.format(record) + "\n", stream)


logger = logging.getLogger("megatron_ettin")
logger.setLevel(logging.INFO)
# a library that configures the root logger must not print every line a second time
logger.propagate = False
if not logger.handlers:
    logger.addHandler(StandardStreamsHandler())


def log_info(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines on standard output. Never raises.

    Args:
        lines: printed as one message.
        stream: where to print them instead, without the logger.
    """
    if stream is not None:
        _write("\n".join(lines) + "\n", stream)
    else:
        _log(logging.INFO, "\n".join(lines))


def log_warning(*lines: str) -> None:
    """Print lines on standard error. Never raises."""
    _log(logging.WARNING, "\n".join(lines))


def log_exception(error: BaseException) -> None:
    """Print an error with its traceback on standard error. Never raises."""
    _log(logging.ERROR, "".join(traceback.format_exception(error)).removesuffix("\n"))


def _log(level: int, message: str) -> None:
    # a handler that a user of the library installed may raise
    with contextlib.suppress(Exception):
        logger.log(level, message, stacklevel=3)


@contextlib.contextmanager
def log_when_slow(line: str) -> Iterator[None]:
    """Print a line on standard error if the block takes longer than `SLOW_SECONDS`."""
    timer = threading.Timer(SLOW_SECONDS, log_warning, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def flush() -> None:
    """Flush standard output and error. Never raises."""
    for stream in (sys.stdout, sys.stderr):
        _write("", stream)


class LossyStream:
    """A text stream whose `write` and `flush` never raise, for libraries that draw by themselves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or lose it, and return its length."""
        with _losing(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, and ignore that it cannot be flushed."""
        with _losing(self._stream):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is an open terminal."""
        return is_terminal(self._stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def errors_on_terminal() -> bool:
    """Return whether standard error is a terminal."""
    return is_terminal(sys.stderr)


def output_on_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return is_terminal(sys.stdout)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is an open terminal."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def error_stream() -> IO[str]:
    """Return standard error as a stream that never raises."""
    return cast(IO[str], LossyStream(sys.stderr))


def open_standard_files() -> None:
    """Open standard input, output and error on /dev/null if they are closed.

    Else the next file that is opened, such as a checkpoint, would get the number and receive what libraries print.
    """
    for number in STANDARD_FILES:
        try:
            os.fstat(number)
        except OSError:
            # os.open takes the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(OUTPUT, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(ERRORS, "w", closefd=False)  # noqa: SIM115


def output_has_no_reader() -> bool:
    """Return whether standard output is a pipe whose reader has ended. If so, redirect it to /dev/null."""
    number = _number(sys.stdout)
    if number < 0:
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    _point_at_nothing(number)
    return True


def output_failure() -> str:
    """Flush standard output. Return the reason if that fails, and mark the stream for `drop_unwritten`; else empty."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _failed.add(_number(sys.stdout))
        return getattr(error, "strerror", None) or str(error)
    return ""


def drop_unwritten() -> None:
    """Drop the buffered text of failed streams: if the interpreter's last flush fails, it changes the exit status."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        number = _number(stream)
        if stream is None or number not in _failed:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            _point_at_nothing(number)
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _write(text: str, stream: TextIO | None) -> None:
    """Write and flush the text, or lose it. Characters that the stream's encoding lacks are escaped."""
    if stream is None:
        return
    with _losing(stream):
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


@contextlib.contextmanager
def _losing(stream: TextIO) -> Iterator[None]:
    """Suppress the error of a stream that cannot be written, and report it once for each file."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = _number(stream)
        if isinstance(error, BrokenPipeError):
            # the reader of a pipe does not come back
            _point_at_nothing(number)
        if number not in _failed:
            _failed.add(number)
            _report(number, error)


def _report(number: int, error: OSError | ValueError) -> None:
    """Report a failure of standard output (file number 1) on standard error, or the reverse."""
    other = sys.stderr if number == OUTPUT else sys.stdout
    if number not in NAMES or _number(other) in (number, -1):
        return
    reason = error.strerror if isinstance(error, OSError) else str(error)
    with contextlib.suppress(OSError, ValueError):
        other.write(f"warning: {NAMES[number]} cannot be written ({reason}); the run goes on, its lines are lost\n")
        other.flush()


def _number(stream: TextIO | None) -> int:
    """Return the file number of a stream; -1 if it has none."""
    try:
        return -1 if stream is None else stream.fileno()
    except (OSError, ValueError, AttributeError):
        return -1


def _point_at_nothing(number: int) -> None:
    """Redirect standard output or error, given by its file number, to /dev/null. Other numbers are ignored."""
    if number in NAMES:
        with contextlib.suppress(OSError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)
