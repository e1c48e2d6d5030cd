"""Write the metrics of each step to every sink of a run.

The record (metrics.jsonl) keeps lines that cannot be written, and no checkpoint is saved before they are. Any other
sink that fails is named once in a warning and switched off, because a dashboard must never stop a run. Optional
sinks open at their first step, so that an error in opening also switches them off only.

Dashboards get the keys of metrics.jsonl as a group and a name; the record itself keeps its flat keys.

Weights & Biases has one page for each run, kept over requeues; the two runs of a pair are in one group. wandb's own
environment variables set the mode (online, offline, disabled) and the key. If the service cannot be reached, the run is
written to disk (`wandb sync` sends it later). Steps that the page has already are not sent again after a resume from an
earlier checkpoint: they are the same to the bit, and wandb cannot replace them.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_ettin.base.errors import first_line
from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import read_json_object

# in the folder of Weights & Biases: the page's id, and the last step that it was sent
STATE = "page.json"
INIT_SECONDS = 60
# longest time that the end of a run waits for data that are not sent yet
FINISH_SECONDS = 120.0


class Sink(Protocol):
    """Destination of the metrics of each step."""

    required: bool
    """Whether a failure stops the run."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Write the metrics of a step, which include `step`."""

    def close(self) -> None:
        """Write what is buffered, at the end of the run."""


class FanOut:
    """Hands each step's metrics to every sink. A sink that fails is switched off, unless it is required."""

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
        """Reason why lines of metrics.jsonl wait to be written; None if none wait."""
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
    """Return the numbers that a dashboard can draw, by `grouped` key; `data/rows` is the row after the step's last."""
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


@dataclass(frozen=True)
class WandbIdentity:
    """Names and settings of a run's page at Weights & Biases."""

    project: str
    name: str
    group: str
    """Group of pages, which the encoder and the decoder of a pair share."""
    config: Mapping[str, Any] = field(default_factory=dict)
    history: int = 0
    """Number of rollbacks (`--from-step`) of the run. Each begins another page."""
    checkpoints: str = "none"
    """"none", "reference" (paths of checkpoints) or "upload" (their files)."""


class WandbSink:
    """A run's page at Weights & Biases. Its state in `directory` is kept over restarts."""

    required = False

    def __init__(self, identity: WandbIdentity, directory: str | Path):
        self.identity, self.directory = identity, Path(directory)
        self._run: Any = None
        # content of page.json
        self._id, self._sent = "", 0

    def log(self, values: Mapping[str, Any]) -> None:
        """Send the numbers of a step that the page does not have yet."""
        if self._run is None:
            self._open()
        step = int(values["step"])
        if step > self._sent:
            self._run.log({"step": step, **scalars(values)}, step=step)
            self._sent = step
            self._remember()

    def keep(self, checkpoint: Path, step: int) -> None:
        """Log a published checkpoint as an artifact, unless `checkpoints` is "none"."""
        if self._run is None or self.identity.checkpoints == "none":
            return
        import wandb

        name = f"{self.identity.name.replace(' ', '-')}-checkpoint"
        artifact = wandb.Artifact(name, "model", metadata={"step": step})
        if self.identity.checkpoints == "upload":
            artifact.add_dir(str(checkpoint))
        else:
            artifact.add_reference(checkpoint.absolute().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def attach(self, name: str, make: Callable[[], Path]) -> None:
        """Log a folder as an artifact. An error becomes a warning; the page stays in use."""
        if self._run is None:
            return
        import wandb

        try:
            artifact = wandb.Artifact(f"{self.identity.name.replace(' ', '-')}-{name}", name)
            artifact.add_dir(str(make()))
            self._run.log_artifact(artifact)
        except Exception as error:
            log_warning(f"wandb: no {name}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Finish the run at the service, and wait for that at most FINISH_SECONDS."""
        if self._run is None:
            return
        # a job whose run is saved must end even if the service does not answer
        ending = threading.Thread(target=self._run.finish, daemon=True)
        ending.start()
        ending.join(FINISH_SECONDS)
        if ending.is_alive():
            log_warning(
                f"wandb: not all sent within {FINISH_SECONDS:.0f} s; `wandb sync {self.directory}` sends the rest"
            )

    def _open(self) -> None:
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        state = self._state()
        self._id, self._sent = state["id"], state["step"]
        self._remember()
        seconds = float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_SECONDS))
        settings = wandb.Settings(init_timeout=seconds, x_disable_stats=True, console="off", silent=True)
        try:
            self._run = self._begun(wandb, settings, None)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError, OSError) as error:
            log_warning(
                f"wandb: {first_line(error)}; the run is written to {self.directory}, to be sent by `wandb sync`"
            )
            # wandb's service process still has the run that could not begin
            wandb.teardown()
            self._run = self._begun(wandb, settings, "offline")
        # tokens are the x-axis of all metrics, because a pair is compared by tokens
        self._run.define_metric("data/tokens")
        self._run.define_metric("*", step_metric="data/tokens")

    def _begun(self, wandb: Any, settings: Any, mode: Any) -> Any:
        return wandb.init(
            project=self.identity.project,
            name=self.identity.name,
            group=self.identity.group,
            id=self._id,
            resume="allow",
            config=dict(self.identity.config),
            dir=str(self.directory),
            mode=mode,
            settings=settings,
        )

    def _state(self) -> dict[str, Any]:
        """Return the stored page's id and last step; those of a new page if none is stored or `history` has changed."""
        try:
            state = read_json_object(self.directory / STATE)
            if state["history"] == self.identity.history:
                return {"id": str(state["id"]), "step": int(state["step"])}
        except (ValueError, KeyError, TypeError):
            pass
        return {"id": f"{self.identity.name.replace(' ', '-')}-{secrets.token_hex(4)}", "step": 0}

    def _remember(self) -> None:
        record = {"id": self._id, "step": self._sent, "history": self.identity.history}
        write_atomically(self.directory / STATE, json.dumps(record) + "\n", durable=False)
