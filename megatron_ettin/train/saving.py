"""Save a run while it trains: all ranks plan, a thread of each writes its part, and rank 0's thread publishes.

A checkpoint that cannot be written (a full disk, a file system that is away) is given up and reported; the previous one
stays the latest. `checkpoint.on_failure` decides whether the run then goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.files import write_atomically
from megatron_ettin.base.log import log_warning
from megatron_ettin.checkpoint import directory, state
from megatron_ettin.checkpoint.writer import NotWrittenError, Plan
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.tables import parameter_count
from megatron_ettin.faults.skipped_steps import TrainingStoppedError
from megatron_ettin.parallel.collectives import barrier, broadcast_object
from megatron_ettin.platform.fp8 import raw_data
from megatron_ettin.train.progress import Progress
from megatron_ettin.train.setup import TrainState

# upper bounds of the bytes per weight, with optimizer (weight, master, two moments) and without
BYTES_OF_A_WEIGHT = {True: 16, False: 4}
# free space that a save needs, relative to the size that is expected of it
SPARE = 1.05
# time that a failed run waits at its end for a save in flight
LEFT_SECONDS = 60.0
MIB = float(1 << 20)


class SaveFailedError(TrainingStoppedError):
    """A checkpoint that had to be written was not."""


@dataclass(frozen=True)
class SaveRequest:
    """A checkpoint to save."""

    progress: Progress
    keep: bool = False
    """Whether it is never pruned."""
    milestone: bool = False
    """Whether it holds the weights alone."""

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return directory.step_name(self.progress.step)


@dataclass
class SaveResult:
    """Outcome of a save."""

    request: SaveRequest
    path: Path | None
    """The published checkpoint; None if the save failed."""
    reason: str = ""
    """Reason why it failed."""


@dataclass
class Saver:
    """Runs one save at a time on every rank. Results exist on rank 0 only until `wait()` broadcasts them."""

    train_state: TrainState
    run_dir: Path
    tokenizer: Path | None
    ends_in_sep: bool = True
    """Whether any chunk of the data ends in a separator token; an export chooses its template by it."""
    save_blocker: Callable[[], str | None] = lambda: None
    """Returns why the run must not be saved now, or None; called on rank 0."""
    result: SaveResult | None = None
    """Result of the last save, until it is read."""
    _thread: threading.Thread | None = None
    # time.monotonic() at which rank 0 stops waiting for the others
    _until: float = float("inf")

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0."""
        return self.train_state.layout.rank == 0

    @property
    def is_busy(self) -> bool:
        """Return whether this rank is writing."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, request: SaveRequest) -> None:
        """Plan a save, snapshot its tensors to host memory, and start writing them in a thread.

        Collective; a save in flight is waited for first. If nothing can be saved, `result` says why.
        """
        self.wait()
        why = broadcast_object(self._prepare(request) if self.is_main_process else None)
        if why is not None:
            self.result = SaveResult(request, None, why)
            return
        plan = self._planned(request, self._staging(request), copies=self.train_state.config.checkpoint.asynchronous)
        self._thread = threading.Thread(target=self._write, args=(request, plan), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.train_state.config.checkpoint.asynchronous:
            # the tensors being written are those that training changes in place
            self._thread.join()
            barrier()

    def _join(self) -> None:
        """Wait until this rank's thread has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def poll(self) -> SaveResult | None:
        """Return the result of a save that has ended, on rank 0 and only once; None if there is none."""
        if self.is_busy:
            return None
        self._join()
        result, self.result = self.result, None
        return result

    def wait(self) -> SaveResult | None:
        """Wait for the save in flight (collective). Return on every rank the result that `poll` did not return yet."""
        self._join()
        result = broadcast_object(self.result)
        self.result = None
        return result

    def close(self) -> None:
        """Wait for the save in flight, but at most 2 * `LEFT_SECONDS`, because other ranks may be gone."""
        self._until = time.monotonic() + LEFT_SECONDS
        if self._thread is not None:
            self._thread.join(2 * LEFT_SECONDS)
            self._thread = None

    def _folder(self, request: SaveRequest) -> Path:
        return (directory.milestones_folder if request.milestone else directory.checkpoints_folder)(self.run_dir)

    def _staging(self, request: SaveRequest) -> Path:
        return directory.staging_of(self._folder(request), request.progress.step)

    def _prepare(self, request: SaveRequest) -> str | None:
        """Make an empty folder to write in, and return None, or the reason why nothing can be saved."""
        if (why := self.save_blocker()) is not None:
            return why
        folder = self._folder(request)
        try:
            directory.new_staging(folder, request.progress.step)
            free, wanted = shutil.disk_usage(folder).free, self._wanted_bytes(request)
        except OSError as error:
            return f"{folder}: {error.strerror or error}"
        if free < wanted:
            self._staging(request).rmdir()
            return f"{folder}: {free / MIB:,.0f} MiB free, a checkpoint takes some {wanted / MIB:,.0f}"
        return None

    def _wanted_bytes(self, request: SaveRequest) -> float:
        last = None if request.milestone else directory.bytes_of_newest(self.run_dir)
        model = self.train_state.config.model
        weights = parameter_count(model, model.vocab_size)
        return SPARE * (last if last is not None else weights * BYTES_OF_A_WEIGHT[not request.milestone])

    def _planned(self, request: SaveRequest, staging: Path, copies: bool) -> Plan:
        """Plan what this rank writes (collective). With `copies`, nothing changes the planned tensors afterwards."""
        train_state = self.train_state
        with train_state.summon_full_params():
            model, optimizer = state.model_state(train_state.model_chunks, train_state.layout.dp_group), None
            if not request.milestone:
                assert train_state.optimizer is not None
                optimizer = train_state.optimizer.sharded_state(model, False)
            if state.keeps_scales(train_state.config.precision):
                model["fp8_scales"] = state.sharded(
                    state.scales_in_use(train_state.model_chunks, model), train_state.layout
                )
            if train_state.optimizer is not None:
                model = train_state.optimizer.weights_to_save(model)
            plan = state.plan_state(staging, model, optimizer, dataclasses.asdict(request.progress))
            # the tensors that DeepSpeed gathers are freed when summon_full_params ends
            if train_state.config.parallel.engine == "deepspeed":
                plan.copy_tensors(None, train_state.platform.synchronize)
            elif copies or train_state.platform.is_gpu:
                plan.copy_tensors(self._live(model), train_state.platform.synchronize)
        return plan

    def _live(self, model: dict[str, Any]) -> set[int]:
        """Return the addresses of the storages that training changes in place."""
        weights = [raw_data(p.data) for chunk in self.train_state.model_chunks for p in chunk.parameters()]
        scales = [entry.data for entry in (model.get("fp8_scales") or {}).values()]
        tensors = [*weights, *scales, *self.train_state.live_optimizer_tensors()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def _write(self, request: SaveRequest, plan: Plan) -> None:
        """Write this rank's part, in its thread. Rank 0's thread then publishes the checkpoint and sets `result`."""
        local = self.train_state.config.checkpoint.staging
        plan.write(None if local is None else Path(local))
        if self.is_main_process:
            try:
                self.result = SaveResult(request, self._publish(request, plan))
            except NotWrittenError as error:
                self._give_up(request, plan, str(error))
            except OSError as error:
                self._give_up(request, plan, f"{error.filename or plan.folder}: {error.strerror or error}")
            else:
                if not request.milestone:
                    self._prune()

    def _give_up(self, request: SaveRequest, plan: Plan, why: str) -> None:
        shutil.rmtree(plan.folder, ignore_errors=True)
        self.result = SaveResult(request, None, why)

    def _prune(self) -> None:
        """Remove the checkpoints that `checkpoint.keep` leaves out, and warn of one that cannot be removed."""
        try:
            directory.prune(self.run_dir, self.train_state.config.checkpoint.keep)
        # only warn, because the new checkpoint is published already
        except OSError as error:
            named = error.filename or self.run_dir
            log_warning(f"warning: {named}: an old checkpoint cannot be removed ({error.strerror or error})")

    def _publish(self, request: SaveRequest, plan: Plan) -> Path:
        known = plan.finish(lambda: time.monotonic() > self._until)
        staging, config = plan.folder, self.train_state.config
        write_atomically(staging / "config.yaml", to_yaml(config))
        record: dict[str, Any] = dataclasses.asdict(request.progress)
        record |= {} if request.milestone else {"optimizer": config.optim.name}
        record |= {"keep": True} if request.keep else {}
        record |= {} if self.ends_in_sep else {"end_token": "none"}
        write_atomically(staging / "progress.json", json.dumps(record, indent=1) + "\n")
        if self.tokenizer is not None and self.tokenizer.is_dir():
            shutil.copytree(self.tokenizer, staging / "tokenizer")
        final = staging.with_name(request.name)
        if request.milestone:
            directory.seal_and_rename(staging, final, known)
        else:
            directory.publish(staging, final, known)
        return final


@dataclass
class Retry:
    """Time of the next try after a failed save, by rank 0's clock; the other ranks learn of it with a step's totals."""

    seconds: float
    """Seconds from the first failure to the next try."""
    wait_seconds: float = 0.0
    """Seconds from the latest failure to the next try."""
    failures: int = 0
    due: float | None = None
    """time.monotonic() of the next try; None if the latest save succeeded or none was made."""

    def after(self, result: SaveResult) -> None:
        """Set the time of the next try after a save: the wait doubles with each failure, up to 16 * `seconds`."""
        if result.path is not None:
            self.failures, self.due = 0, None
            return
        self.wait_seconds = self.seconds * 2 ** min(self.failures, 4)
        self.due = time.monotonic() + self.wait_seconds
        self.failures += 1

    @property
    def is_due(self) -> bool:
        """Return whether the time of the next try has come."""
        return self.due is not None and time.monotonic() >= self.due


def failure_line(result: SaveResult, last: int | None, then: str) -> str:
    """Return the log line about a save that failed.

    Args:
        result: Result of the save.
        last: Step of the latest checkpoint; None if there is none.
        then: What happens next.
    """
    kept = "there is none before it" if last is None else f"the latest is that of step {last}"
    return f"{result.request.name} could not be saved ({result.reason}); {kept}; {then}"
