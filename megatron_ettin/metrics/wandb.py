"""Send metrics to Weights & Biases: one page for each run, kept over requeues, with a pair in one group.

Mode (online, offline, disabled) and key are wandb's own environment variables. Where the service cannot be reached the
run is written to disk instead (`wandb sync` sends it later). Steps that the page has already are not sent again after a
resume from an earlier checkpoint: they are the same to the bit, and wandb cannot take them back.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin.base.errors import first_line
from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.base.parsing import read_json_object
from megatron_ettin.metrics.sinks import scalars

# in the sink's folder: the page's id, and the last step that it was sent
STATE = "page.json"
INIT_SECONDS = 60
# the longest that the end of a run waits for what is not sent yet
FINISH_SECONDS = 120.0


@dataclass(frozen=True)
class WandbIdentity:
    """Names of the page."""

    project: str
    name: str
    group: str
    """Shared by a pair."""
    config: Mapping[str, Any] = field(default_factory=dict)
    history: int = 0
    """Changes when a run goes back to an earlier step to train on other rows, which begins another page."""
    checkpoints: str = "none"
    """"none", "reference" (paths of checkpoints) or "upload" (their files)."""


class WandbSink:
    """One page; its directory is kept over restarts."""

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
        """Log a published checkpoint as an artifact where `checkpoints` is set."""
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
        """Log a folder as an artifact. An error becomes a warning, and the page ends as without it."""
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
        """Finish the run at the service, as far as that takes no longer than FINISH_SECONDS."""
        if self._run is None:
            return
        # the service may be away, and a job that has saved must end
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
            # its process still has the run that did not begin
            wandb.teardown()
            self._run = self._begun(wandb, settings, "offline")
        # a pair is compared by tokens: the x-axis of everything
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
        """Return the state of the page of this history; a new page where there is none."""
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
