"""Measure the validation loss while a run trains."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ettin.base.log import log_info
from megatron_ettin.evaluate import evaluation
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.progress import StepResult, is_done


class Evaluation(Hook):
    """Evaluates on the validation datasets every `metrics.eval_every_steps` steps and at the end, in all and by source.

    A hybrid run is evaluated on each of its row objectives; the figures of the first have no suffix.
    """

    def __init__(self, held_out: Sequence[evaluation.EvalDataset]) -> None:
        self.held_out = held_out

    def step(self, run: Run, result: StepResult) -> None:
        every = run.config.metrics.eval_every_steps
        if (every is None or result.step % every) and not is_done(run.config, run.progress):
            return
        run.heartbeat.enter("evaluating")
        for number, held_out in enumerate(self.held_out):
            suffix = f"_{held_out.kind}" if number else ""
            measured = evaluation.evaluate(run.train_state, held_out, run.config.metrics.eval_rows)
            result.extra[f"validation_loss{suffix}"] = measured.loss
            result.extra[f"validation_accuracy{suffix}"] = measured.accuracy
            if len(measured.sources) > 1:
                parts = {f"validation_loss{suffix}/{name}": part.loss for name, part in measured.sources.items()}
                result.extra.update(parts)
            if run.is_main_process:
                whole, *lines = measured.lines()
                kind = f"{held_out.kind} " if len(self.held_out) > 1 else ""
                log_info(f"step {result.step} validation {kind}{whole}", *lines)
        run.heartbeat.step()
