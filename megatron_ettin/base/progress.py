"""Show the progress of long work on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from megatron_ettin.base.log import error_stream, errors_on_terminal, log_warning
from megatron_ettin.base.text import format_count

LINE_EVERY_SECONDS = 10.0


@contextlib.contextmanager
def progress_report(title: str, unit: str) -> Iterator[Callable[..., None]]:
    """Yield report(done, total, tokens=0), which moves a bar on a terminal and else logs a line every 10 s.

    Args:
        title: name of the work, shown before the bar or at the start of a line.
        unit: name of what `total` counts, for the lines.
    """
    if errors_on_terminal():
        with _bar(title) as report:
            yield report
    else:
        yield _plain_lines(title, unit)


def _plain_lines(title: str, unit: str) -> Callable[..., None]:
    began = time.monotonic()
    last = began

    def report(done: int, total: int, tokens: int = 0) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_SECONDS:
            return
        last = now
        line = f"{title}: {done / max(total, 1):.0%} of {format_count(total)} {unit}"
        if tokens:
            line += f", {format_count(tokens)} tokens, {format_count(tokens / (now - began))} tokens/s"
        log_warning(line)

    return report


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=error_stream()), transient=True) as progress:
        began = time.monotonic()
        line = progress.add_task(title, total=None, speed="")

        def report(done: int, total: int, tokens: int = 0) -> None:
            speed = f"{format_count(tokens / max(time.monotonic() - began, 1e-9))} tokens/s" if tokens else ""
            progress.update(line, completed=done, total=total, speed=speed)

        yield report


@contextlib.contextmanager
def items_report(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield report(done, total, line) for work in few large parts.

    On a terminal it draws a bar with the newest line; elsewhere it writes every line to standard error. Text that is
    printed meanwhile appears above the bar.
    """
    if not errors_on_terminal():
        yield lambda done, total, line: log_warning(f"[{done}/{total}] " * (done > 0) + line)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=error_stream())
    with Progress(*columns, TextColumn("{task.fields[line]}"), console=console, transient=True) as progress:
        bar = progress.add_task(title, total=None, line="")
        yield lambda done, total, line: progress.update(bar, completed=done, total=total, line=line)
