"""Saving a run while it trains: planned on all ranks together, written by a thread of each, published by rank 0's.

A checkpoint that cannot be written (a full disk, a file system that is away) is given up and told of; the one before it
stays the latest. Whether the run then goes on is `checkpoint.on_failure`'s to say."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.base.files import write_atomically
from megatron_ettin.checkpoint import directory, state
from megatron_ettin.checkpoint.writer import NotWritten, Plan
from megatron_ettin.config.resolve import to_yaml
from megatron_ettin.config.tables import parameter_count
from megatron_ettin.faults.skipped_steps import TrainingStopped
from megatron_ettin.parallel.collectives import barrier, broadcast_object
from megatron_ettin.platform.fp8 import raw_data
from megatron_ettin.train.progress import Progress
from megatron_ettin.train.setup import TrainState

BYTES_OF_A_WEIGHT = {True: 16, False: 4}  # with optimizer (weight, master, two moments) and without, at most
SPARE = 1.05  # of the space that a checkpoint is expected to take
LEFT_SECONDS = 60.0  # that the end of a run which failed waits for what is being written
MIB = float(1 << 20)


class SaveFailed(TrainingStopped):
    """A checkpoint that had to be written was not."""


@dataclass(frozen=True)
class SaveRequest:
    """What is to be saved. `keep`: for good. `milestone`: weights alone."""

    progress: Progress
    keep: bool = False
    milestone: bool = False

    @property
    def name(self) -> str:
        return directory.step_name(self.progress.step)


@dataclass
class SaveResult:
    """Of a save: `path`, or why there is none."""

    wish: SaveRequest
    path: Path | None
    why: str = ""


@dataclass
class Saver:
    """One save at a time. On every rank; outcomes are rank 0's until `wait` tells them to all."""

    train_state: TrainState
    run_dir: Path
    tokenizer: Path | None
    ends_in_sep: bool = True  # any chunk of the data, by which an export knows its template
    save_blocker: Callable[[], str | None] = lambda: None  # why the run must not be saved now, rank 0's
    outcome: SaveResult | None = None  # of the last save, until it is taken
    _thread: threading.Thread | None = None
    _until: float = float("inf")  # when rank 0 stops waiting for the others

    @property
    def is_main_process(self) -> bool:
        return self.train_state.layout.rank == 0

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, wish: SaveRequest) -> None:
        """Plan a save, copy what it is of, and start to write it. Collective; one in flight is waited for first."""
        self.wait()
        why = broadcast_object(self._prepare(wish) if self.is_main_process else None)
        if why is not None:
            self.outcome = SaveResult(wish, None, why)
            return
        plan = self._planned(wish, self._staging(wish), copies=self.train_state.config.checkpoint.asynchronous)
        self._thread = threading.Thread(target=self._write, args=(wish, plan), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.train_state.config.checkpoint.asynchronous:
            self._thread.join()  # what is written is what the optimizer would go on in
            barrier()

    def _join(self) -> None:
        """Wait until this rank's thread has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def poll(self) -> SaveResult | None:
        """The outcome of a save that has ended, once; rank 0's."""
        if self.is_busy:
            return None
        self._join()
        outcome, self.outcome = self.outcome, None
        return outcome

    def wait(self) -> SaveResult | None:
        """Wait for what is being written; the outcome that was not taken yet, on every rank. Collective."""
        self._join()
        outcome = broadcast_object(self.outcome)
        self.outcome = None
        return outcome

    def close(self) -> None:
        """The run is over, one way or another: let what is being written end, but not for ever, for other ranks may be
        gone."""
        self._until = time.monotonic() + LEFT_SECONDS
        if self._thread is not None:
            self._thread.join(2 * LEFT_SECONDS)
            self._thread = None

    def _folder(self, wish: SaveRequest) -> Path:
        return (directory.milestones_folder if wish.milestone else directory.checkpoints_folder)(self.run_dir)

    def _staging(self, wish: SaveRequest) -> Path:
        return directory.staging_of(self._folder(wish), wish.progress.step)

    def _prepare(self, wish: SaveRequest) -> str | None:
        """Make an empty folder to write in; return why nothing can be saved."""
        if (why := self.save_blocker()) is not None:
            return why
        folder = self._folder(wish)
        try:
            directory.new_staging(folder, wish.progress.step)
            free, wanted = shutil.disk_usage(folder).free, self._wanted_bytes(wish)
        except OSError as error:
            return f"{folder}: {error.strerror or error}"
        if free < wanted:
            self._staging(wish).rmdir()
            return f"{folder}: {free / MIB:,.0f} MiB free, a checkpoint takes some {wanted / MIB:,.0f}"
        return None

    def _wanted_bytes(self, wish: SaveRequest) -> float:
        last = None if wish.milestone else directory.bytes_of_newest(self.run_dir)
        model = self.train_state.config.model
        weights = parameter_count(model, model.vocab_size)
        return SPARE * (last if last is not None else weights * BYTES_OF_A_WEIGHT[not wish.milestone])

    def _planned(self, wish: SaveRequest, staging: Path, copies: bool) -> Plan:
        """What this rank writes, in memory that nothing else writes to. Collective."""
        train_state = self.train_state
        metadata = state.sharding_metadata(train_state.layout.dp_group)
        with train_state.summon_full_params():
            model, optimizer = state.model_state(train_state.model_chunks, metadata), None
            if not wish.milestone:
                assert train_state.optimizer is not None
                optimizer = train_state.optimizer.sharded_state(model, False)
            if state.keeps_scales(train_state.config):
                model["fp8_scales"] = state.sharded(
                    state.scales_in_use(train_state.model_chunks, model), train_state.layout
                )
            if train_state.optimizer is not None:
                model = train_state.optimizer.weights_to_save(model)
            plan = state.plan_state(staging, model, optimizer, dataclasses.asdict(wish.progress))
            if train_state.config.parallel.engine == "deepspeed":  # what it gathers is gone with summon_full_params
                plan.copy_tensors(None, train_state.platform.synchronize)
            elif copies or train_state.platform.is_gpu:
                plan.copy_tensors(self._live(model), train_state.platform.synchronize)
        return plan

    def _live(self, model: dict[str, Any]) -> set[int]:
        """The memory in which training goes on."""
        weights = [raw_data(p.data) for chunk in self.train_state.model_chunks for p in chunk.parameters()]
        scales = [entry.data for entry in (model.get("fp8_scales") or {}).values()]
        return state.storages([*weights, *scales, *self.train_state.live_optimizer_tensors()])

    def _write(self, wish: SaveRequest, plan: Plan) -> None:
        """The thread of a rank; what rank 0's finds out is the outcome."""
        local = self.train_state.config.checkpoint.staging
        plan.write(None if local is None else Path(local))
        if self.is_main_process:
            try:
                self.outcome = SaveResult(wish, self._publish(wish, plan))
            except NotWritten as error:
                self._give_up(wish, plan, str(error))
            except OSError as error:
                self._give_up(wish, plan, f"{error.filename or plan.folder}: {error.strerror or error}")

    def _give_up(self, wish: SaveRequest, plan: Plan, why: str) -> None:
        shutil.rmtree(plan.folder, ignore_errors=True)
        self.outcome = SaveResult(wish, None, why)

    def _publish(self, wish: SaveRequest, plan: Plan) -> Path:
        known, staging, config = (
            plan.finish(lambda: time.monotonic() > self._until),
            plan.folder,
            self.train_state.config,
        )
        write_atomically(staging / "config.yaml", to_yaml(config))
        record: dict[str, Any] = dataclasses.asdict(wish.progress)
        record |= {} if wish.milestone else {"optimizer": config.optim.name}
        record |= {"keep": True} if wish.keep else {}
        record |= {} if self.ends_in_sep else {"end_token": "none"}
        write_atomically(staging / "progress.json", json.dumps(record, indent=1) + "\n")
        if self.tokenizer is not None and self.tokenizer.is_dir():
            shutil.copytree(self.tokenizer, staging / "tokenizer")
        final = staging.with_name(wish.name)
        if wish.milestone:
            directory.seal_and_rename(staging, final, known)
        else:
            directory.publish(staging, final, known)
            directory.prune(self.run_dir, config.checkpoint.keep)
        return final


@dataclass
class Retry:
    """When a save that failed is tried again: rank 0's clock decides, the step's sums tell the others."""

    seconds: float
    failures: int = 0
    due: float | None = None

    def after(self, outcome: SaveResult) -> None:
        if outcome.path is not None:
            self.failures, self.due = 0, None
            return
        self.due = time.monotonic() + self.seconds * 2 ** min(self.failures, 4)
        self.failures += 1

    @property
    def is_due(self) -> bool:
        return self.due is not None and time.monotonic() >= self.due


def told(outcome: SaveResult, going_on: Mapping[str, Any]) -> str:
    """A line for a save that failed."""
    last = going_on["last"]
    kept = "there is none before it" if last is None else f"the latest is that of step {last}"
    return f"{outcome.wish.name} could not be saved ({outcome.why}); {kept}; {going_on['then']}"
