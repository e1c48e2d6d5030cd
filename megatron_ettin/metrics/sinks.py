"""Write the metrics of each step to every sink of a run.

The record (metrics.jsonl) keeps lines that cannot be written, and no checkpoint is saved before they are. Any other
sink that fails is named once in a warning and switched off, because a dashboard must never stop a run. Optional
sinks open at their first line, so that opening is isolated as well.

Dashboards get the keys of metrics.jsonl as a group and a name; the record itself keeps its flat keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ettin.base.log import log_warning


class Sink(Protocol):
    """Destination of the metrics of each step."""

    required: bool
    """Whether a failure stops the run."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Take the metrics of a step, `step` among them."""

    def close(self) -> None:
        """Write what is left, at the end of the run."""


class FanOut:
    """Hand each step's metrics to every sink; one that fails is switched off unless it is required."""

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def log(self, values: Mapping[str, Any]) -> None:
        """Pass the metrics of a step to every sink."""
        for sink in list(self.sinks):
            self._call(sink, sink.log, values)

    def keep(self, checkpoint: Path, step: int) -> None:
        """Pass a published checkpoint to the sinks that have a `keep`."""
        for sink in list(self.sinks):
            if hasattr(sink, "keep"):
                self._call(sink, sink.keep, checkpoint, step)

    @property
    def problem(self) -> str | None:
        """Reason why lines of the record wait to be written; None where none do."""
        return next(filter(None, (getattr(sink, "problem", None) for sink in self.sinks)), None)

    def attach(self, name: str, make: Callable[[], Path]) -> None:
        """Pass files of the run, in the folder that `make` writes and returns, to the sinks that have an `attach`."""
        for sink in list(self.sinks):
            if hasattr(sink, "attach"):
                self._call(sink, sink.attach, name, make)

    def close(self) -> None:
        """Close every sink."""
        for sink in list(self.sinks):
            self._call(sink, sink.close)

    def _call(self, sink: Sink, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            if sink.required:
                raise
            self.sinks.remove(sink)
            log_warning(f"warning: {type(sink).__name__} is switched off: {type(error).__name__}: {error}")


GROUPED = {
    "loss": "train/loss",
    "tokens": "data/tokens",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "tflops_per_second": "speed/tflops_per_second",
    "step_seconds": "speed/step_seconds",
    "slowest_rank": "speed/slowest_rank",
    "slowest_ratio": "speed/slowest_ratio",
    "labels": "data/labels",
    "peak_memory_bytes": "memory/peak_bytes",
}
# the first prefix of a key is replaced; what follows stays
PREFIXES = {
    "validation_loss": "validation/loss",
    "validation_accuracy": "validation/accuracy",
    "loss_": "train/loss_",
    "labels_": "data/labels_",
}


def grouped(key: str) -> str:
    """Return a key with its group: `loss` -> `train/loss`, `validation_loss/web` -> `validation/loss/web`.

    Other keys go to `train/`.
    """
    if key in GROUPED:
        return GROUPED[key]
    for prefix, group in PREFIXES.items():
        if key.startswith(prefix):
            return group + key.removeprefix(prefix)
    return f"train/{key}"


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that a dashboard can draw, under their groups; `data/rows` is where the step's rows end."""
    numbers = {
        grouped(key): value
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    rows = values.get("rows")
    return numbers | ({"data/rows": rows[1]} if rows else {})


class TensorBoardSink:
    """TensorBoard event files. Steps after `resume_step` that an earlier process wrote are purged."""

    required = False

    def __init__(self, directory: str | Path, resume_step: int | None = None):
        self.directory, self.resume_step = Path(directory), resume_step
        self._writer: Any = None

    def log(self, values: Mapping[str, Any]) -> None:
        """Write the numbers of a step as scalars."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self.resume_step is None else self.resume_step + 1
            self._writer = SummaryWriter(str(self.directory), purge_step=purge)
        for key, value in scalars(values).items():
            self._writer.add_scalar(key, value, global_step=values["step"])

    def close(self) -> None:
        """Write what is buffered and close the file."""
        if self._writer is not None:
            self._writer.close()
