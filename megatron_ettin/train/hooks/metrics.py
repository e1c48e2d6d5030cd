"""Measure the validation loss, and write every step's figures to metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin import __version__
from megatron_ettin.base.log import log_info
from megatron_ettin.base.versions import code_hash, library_versions
from megatron_ettin.checkpoint.directory import step_of
from megatron_ettin.config.tables import long_name, short_name
from megatron_ettin.evaluate.evaluation import EvalDataset, evaluate
from megatron_ettin.metrics.record import JsonlSink
from megatron_ettin.metrics.sinks import FanOut, Sink, TensorBoardSink, WandbIdentity, WandbSink
from megatron_ettin.platform import Platform
from megatron_ettin.runs.directory import RunDirectory
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import StepResult


def step_metrics(result: StepResult, platform: Platform, world: int) -> dict[str, Any]:
    """Return a step's entry in metrics.jsonl."""
    peak = platform.peak_flops
    return {
        "step": result.step,
        "tokens": result.tokens,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "updated": result.updated,
        "tokens_per_second": result.step_tokens / result.seconds,
        "mfu": result.flops / result.seconds / (peak * world) if peak else None,
        "tflops_per_second": result.flops / result.seconds / 1e12,
        "rows": list(result.rows),
        "labels": result.labels,
        "step_seconds": result.seconds,
        "peak_memory_bytes": platform.peak_memory_bytes(),
        **result.extra,
    }


def wandb_identity(run: Run) -> WandbIdentity:
    """Return the names and the configuration of the run's page at Weights & Biases."""
    config, corpus = run.config, run.batches.corpus
    settings, named = config.metrics, config.run
    name = short_name(named.size, config.model)
    group = settings.wandb_group or f"{name}-{corpus.unskipped_fingerprint[:8]}-seed{named.seed}"
    shown = dataclasses.asdict(config)
    shown["versions"] = {"megatron_ettin": __version__, "code": code_hash(), "libraries": library_versions()}
    shown["model_name"] = long_name(named.size, config.model)
    shown["data_order"] = corpus.fingerprint
    return WandbIdentity(
        settings.wandb_project,
        f"{name} {named.objective} {named.phase}",
        group,
        shown,
        history=len(RunDirectory(run.directory).rollbacks),
        checkpoints=settings.wandb_checkpoints,
    )


class Evaluation(Hook):
    """Evaluates on the validation data every `metrics.eval_every_steps` steps and at the end, in total and by source.

    A hybrid run is evaluated on each of its row objectives; the figures of the first have no suffix.
    """

    def __init__(self, held_out: Sequence[EvalDataset]) -> None:
        self.held_out = held_out

    def step(self, run: Run, result: StepResult) -> None:
        """Evaluate every `metrics.eval_every_steps` steps and at the end (collective); add the figures to `result`."""
        every = run.config.metrics.eval_every_steps
        if (every is None or result.step % every) and not run.is_done:
            return
        run.heartbeat.enter("evaluating")
        for number, held_out in enumerate(self.held_out):
            suffix = f"_{held_out.row_objective}" if number else ""
            measured = evaluate(run.train_state, held_out, run.config.metrics.eval_rows)
            result.extra[f"validation_loss{suffix}"] = measured.loss
            result.extra[f"validation_accuracy{suffix}"] = measured.accuracy
            if len(measured.sources) > 1:
                parts = {f"validation_loss{suffix}/{name}": part.loss for name, part in measured.sources.items()}
                result.extra.update(parts)
            if run.is_main_process:
                whole, *lines = measured.lines()
                objective = f"{held_out.row_objective} " if len(self.held_out) > 1 else ""
                log_info(f"step {result.step} validation {objective}{whole}", *lines)
        run.heartbeat.step()


class Metrics(Hook):
    """Writes every step to metrics.jsonl, and to TensorBoard and wandb if configured."""

    def start(self, run: Run) -> None:
        """Open the files on rank 0, without steps after the one from which the run continues."""
        self.sinks = FanOut([])
        if not run.is_main_process:
            return
        settings, step = run.config.metrics, run.progress.step
        sinks: list[Sink] = [JsonlSink(run.directory / "metrics.jsonl", resume_step=step)]
        if settings.tensorboard:
            sinks.append(TensorBoardSink(run.directory / "events", resume_step=step))
        if settings.wandb:
            sinks.append(WandbSink(wandb_identity(run), run.directory / "wandb"))
        self.sinks = FanOut(sinks)

    def step(self, run: Run, result: StepResult) -> None:
        """Write the step's figures."""
        if run.is_main_process:
            self.sinks.log(step_metrics(result, run.train_state.platform, run.train_state.layout.topology.world))

    def save(self, run: Run, path: Path) -> None:
        """Log a checkpoint at Weights & Biases if that is configured."""
        self.sinks.keep(path, step_of(path))

    def save_blocker(self) -> str | None:
        """Return why lines of metrics.jsonl wait to be written, or None. No checkpoint may be newer than the file."""
        return self.sinks.problem

    def stop(self, run: Run) -> None:
        """Write the report if that is configured, and close the files."""
        metrics = run.config.metrics
        if run.is_main_process and metrics.wandb and metrics.wandb_report and run.is_done:
            run.heartbeat.enter("writing the report")
            self.sinks.attach("report", lambda: write_report(run.directory))
        self.sinks.close()


def write_report(run_dir: Path) -> Path:
    """Write the page of `ettin report` and its figures, and return their folder."""
    # matplotlib takes seconds to import
    from megatron_ettin.report import document, plots

    folder = run_dir / "report"
    report = document.make([run_dir])
    document.write(folder / "report.html", document.render(report).encode())
    for name, content in plots.figures(report.models, "png"):
        document.write(folder / "figures" / name, content)
    return folder
