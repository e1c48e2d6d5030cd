"""What happens besides training: logging, checkpoints, evaluation. Each is a hook with four moments; the loop knows
no more of them than that. Hooks run on every rank, in order; those that write look at the rank themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ettin import __version__
from megatron_ettin.base.log import log_info
from megatron_ettin.base.versions import code_hash, library_versions
from megatron_ettin.batching.batches import Batches
from megatron_ettin.checkpoint.directory import step_of
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import long_name, short_name
from megatron_ettin.evaluate import evaluation
from megatron_ettin.faults.anomalies import AnomalyDetector
from megatron_ettin.metrics import FanOut, JsonlSink, Sink, TensorBoardSink, WandbIdentity, WandbSink
from megatron_ettin.parallel.failure_report import Heartbeat
from megatron_ettin.platform import Platform
from megatron_ettin.runs.rollback import rolled_back
from megatron_ettin.train.progress import Progress, is_done
from megatron_ettin.train.setup import TrainState
from megatron_ettin.train.step import StepInfo


@dataclass
class Run:
    """What hooks see of a run. `progress` is replaced after every step."""

    train_state: TrainState
    batches: Batches
    directory: Path
    progress: Progress
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    request: float = 0.0  # what rank 0 asks of all ranks with the next step's sums
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # entered by who runs it

    @property
    def config(self) -> Config:
        return self.train_state.config

    @property
    def guard(self) -> AnomalyDetector:
        """By what the next step is judged."""
        optimizer = self.train_state.optimizer
        return AnomalyDetector(self.config.resilience, self.progress.recent, optimizer is None or optimizer.can_skip)

    @property
    def is_main_process(self) -> bool:
        return self.train_state.layout.rank == 0

    @property
    def tokenizer(self) -> Path:
        return self.batches.corpus.datasets[0].path / "tokenizer"


class Hook:
    """Four moments, at which the default is to do nothing."""

    def start(self, run: Run) -> None: ...
    def step(self, run: Run, info: StepInfo) -> None: ...
    def save(self, run: Run, path: Path) -> None: ...
    def stop(self, run: Run) -> None: ...

    def save_blocker(self) -> str | None:
        """Return why the run must not be saved now; rank 0 is asked before each save."""
        return None


class GarbageCollection(Hook):
    """Python's own collector stops a rank at a moment of its own, and all others wait for it at the next collective:
    here every rank collects at the same steps, the young generations only."""

    EVERY_STEPS = 50

    def start(self, run: Run) -> None:
        gc.collect()
        gc.disable()

    def step(self, run: Run, info: StepInfo) -> None:
        if info.step % self.EVERY_STEPS == 0:
            gc.collect(1)

    def stop(self, run: Run) -> None:
        gc.enable()


def step_metrics(info: StepInfo, platform: Platform, world: int) -> dict[str, Any]:
    """The flat keys of metrics.jsonl."""
    peak = platform.peak_flops
    return {
        "step": info.step,
        "tokens": info.tokens,
        "loss": info.loss,
        "lr": info.lr,
        "grad_norm": info.grad_norm,
        "updated": info.updated,
        "tokens_per_second": info.step_tokens / info.seconds,
        "mfu": info.flops / info.seconds / (peak * world) if peak else None,
        "tflops_per_second": info.flops / info.seconds / 1e12,
        "rows": list(info.rows),
        "labels": info.labels,
        "step_seconds": info.seconds,
        "peak_memory_bytes": platform.peak_memory_bytes(),
        **info.extra,
    }


def page_of(run: Run) -> WandbIdentity:
    """The run's page at Weights & Biases."""
    config, corpus = run.config, run.batches.corpus
    settings, named = config.metrics, config.run
    name = short_name(named.size, config.model)
    group = settings.wandb_group or f"{name}-{corpus.unskipped_fingerprint[:8]}-seed{named.seed}"
    told = dataclasses.asdict(config)
    told["versions"] = {"megatron_ettin": __version__, "code": code_hash(), "libraries": library_versions()}
    told["model_name"] = long_name(named.size, config.model)
    told["data_order"] = corpus.fingerprint
    return WandbIdentity(
        settings.wandb_project,
        f"{name} {named.objective} {named.phase}",
        group,
        told,
        history=len(rolled_back(run.directory)),
        checkpoints=settings.wandb_checkpoints,
    )


class Metrics(Hook):
    """Every step to metrics.jsonl, and to TensorBoard and wandb where asked for."""

    def start(self, run: Run) -> None:
        self.sinks = FanOut([])
        if not run.is_main_process:
            return
        settings, step = run.config.metrics, run.progress.step
        sinks: list[Sink] = [JsonlSink(run.directory / "metrics.jsonl", resume_step=step)]
        if settings.tensorboard:
            sinks.append(TensorBoardSink(run.directory / "events", resume_step=step))
        if settings.wandb:
            sinks.append(WandbSink(page_of(run), run.directory / "wandb"))
        self.sinks = FanOut(sinks)

    def step(self, run: Run, info: StepInfo) -> None:
        if run.is_main_process:
            self.sinks.log(step_metrics(info, run.train_state.platform, run.train_state.layout.topology.world))

    def save(self, run: Run, path: Path) -> None:
        self.sinks.keep(path, step_of(path))

    def save_blocker(self) -> str | None:
        return self.sinks.problem

    def stop(self, run: Run) -> None:
        metrics = run.config.metrics
        if run.is_main_process and metrics.wandb and metrics.wandb_report and is_done(run.config, run.progress):
            run.heartbeat.enter("writing the report")
            self.sinks.attach("report", lambda: report_of(run.directory))
        self.sinks.close()


def report_of(run_dir: Path) -> Path:
    """A folder with the page of `ettin report` and its figures."""
    from megatron_ettin.report import document, plots  # matplotlib takes its time

    folder = run_dir / "report"
    report = document.make([run_dir])
    document.write(folder / "report.html", document.render(report).encode())
    for name, content in plots.figures(report.models, "png"):
        document.write(folder / "figures" / name, content)
    return folder


class Evaluation(Hook):
    """Loss on the validation datasets every so many steps and at the end, in all and by source; of a hybrid run, read
    in each of its ways, the first of which needs no suffix."""

    def __init__(self, held_out: Sequence[evaluation.EvalDataset]) -> None:
        self.held_out = held_out

    def step(self, run: Run, info: StepInfo) -> None:
        every = run.config.metrics.eval_every_steps
        if (every is None or info.step % every) and not is_done(run.config, run.progress):
            return
        run.heartbeat.enter("evaluating")
        for number, held_out in enumerate(self.held_out):
            suffix = f"_{held_out.kind}" if number else ""
            result = evaluation.evaluate(run.train_state, held_out, run.config.metrics.eval_rows)
            info.extra[f"validation_loss{suffix}"] = result.loss
            info.extra[f"validation_accuracy{suffix}"] = result.accuracy
            if len(result.sources) > 1:
                parts = {f"validation_loss{suffix}/{name}": part.loss for name, part in result.sources.items()}
                info.extra.update(parts)
            if run.is_main_process:
                whole, *lines = result.lines()
                kind = f"{held_out.kind} " if len(self.held_out) > 1 else ""
                log_info(f"step {info.step} validation {kind}{whole}", *lines)
        run.heartbeat.step()
