"""TensorBoard event files beside the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ettin.metrics.names import scalars


class TensorBoardSink:
    """Scalars by step under `directory`. Steps after `resume_step` that an earlier process wrote are purged."""

    required = False

    def __init__(self, directory: str | Path, resume_step: int | None = None):
        self.directory, self.resume_step = Path(directory), resume_step
        self._writer: Any = None

    def log(self, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self.resume_step is None else self.resume_step + 1
            self._writer = SummaryWriter(str(self.directory), purge_step=purge)
        for key, value in scalars(values).items():
            self._writer.add_scalar(key, value, global_step=values["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
