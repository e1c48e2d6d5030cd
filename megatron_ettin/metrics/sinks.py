"""Write the metrics of each step to every sink of a run.

The record (metrics.jsonl) keeps lines that cannot be written, and no checkpoint is saved before they are. Any other
sink that fails is named once in a warning and switched off, because a dashboard must never stop a run. Optional
sinks open at their first line, so that opening is isolated as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ettin.base.log import log_warning


class Sink(Protocol):
    """One place that takes the numbers of a step."""

    required: bool  # whether a failure stops the run

    def log(self, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class FanOut:
    """Hands each step's numbers to every sink; one that is not required and fails is switched off."""

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def log(self, values: Mapping[str, Any]) -> None:
        for sink in list(self.sinks):
            self._ask(sink, sink.log, values)

    def keep(self, checkpoint: Path, step: int) -> None:
        """A checkpoint was published: for the sinks that care."""
        for sink in list(self.sinks):
            if hasattr(sink, "keep"):
                self._ask(sink, sink.keep, checkpoint, step)

    @property
    def problem(self) -> str | None:
        """Why lines of the record wait to be written; None where none do."""
        return next(filter(None, (getattr(sink, "problem", None) for sink in self.sinks)), None)

    def attach(self, name: str, make: Callable[[], Path]) -> None:
        """Files of the run, which `make` writes and returns the folder of: for the sinks that care."""
        for sink in list(self.sinks):
            if hasattr(sink, "attach"):
                self._ask(sink, sink.attach, name, make)

    def close(self) -> None:
        for sink in list(self.sinks):
            self._ask(sink, sink.close)

    def _ask(self, sink: Sink, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            if sink.required:
                raise
            self.sinks.remove(sink)
            log_warning(f"warning: {type(sink).__name__} is switched off: {type(error).__name__}: {error}")
