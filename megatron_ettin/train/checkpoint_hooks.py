"""When a run is saved: resumable checkpoints every so often and at the end, milestones of weights alone."""

from __future__ import annotations

from megatron_ettin.train import resume
from megatron_ettin.train.hooks import Hook, Run
from megatron_ettin.train.step import StepInfo


class Checkpoints(Hook):
    """Saves every so many steps or tokens, and at the end."""

    def __init__(self, others: list[Hook]) -> None:
        self.others = others
        self.saved_step = -1

    def start(self, run: Run) -> None:
        self.saved_step = run.progress.step
        self.saved_tokens = run.progress.tokens

    def step(self, run: Run, info: StepInfo) -> None:
        settings = run.config.checkpoint
        by_steps = settings.every_steps is not None and info.step % settings.every_steps == 0
        every = settings.every_tokens
        by_tokens = every is not None and info.tokens // every > self.saved_tokens // every
        if by_steps or by_tokens or info.stop_requested:
            self._save(run)

    def stop(self, run: Run) -> None:
        if run.progress.step != self.saved_step:
            self._save(run)

    def _save(self, run: Run) -> None:
        run.heart.slow("saving a checkpoint")
        path = resume.save(run.machine, run.progress, run.directory, run.tokenizer)
        self.saved_step, self.saved_tokens = run.progress.step, run.progress.tokens
        run.heart.slow("going on from a save", run.heart.hang_seconds, saved_step=self.saved_step)
        for hook in self.others:
            hook.save(run, path)


class Milestones(Hook):
    """Weights alone, each time that the run passes a multiple of `checkpoint.weights_every_tokens`; all are kept."""

    def step(self, run: Run, info: StepInfo) -> None:
        every = run.config.checkpoint.weights_every_tokens
        if every is not None and info.tokens // every > (info.tokens - info.step_tokens) // every:
            run.heart.slow("saving weights")
            resume.save_milestone(run.machine, run.progress, run.directory, run.tokenizer)
            run.heart.step()
