"""Show a run while it trains: a bar on a terminal, plain lines in a log, or JSON lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TextIO

from megatron_ettin.base.log import error_stream, errors_on_terminal, log_info, output_on_terminal
from megatron_ettin.base.text import duration, format_count
from megatron_ettin.checkpoint.directory import step_of
from megatron_ettin.config.schema import RunSettings
from megatron_ettin.config.tables import short_name
from megatron_ettin.train.hooks.base import Hook, Run
from megatron_ettin.train.hooks.metrics import step_metrics
from megatron_ettin.train.progress import StepResult

# weight of the earlier steps in the smoothed speed from which the time left is estimated
SMOOTHED = 0.9


class Console(Hook):
    """Shows each step to a person, or writes it as a JSON line."""

    def __init__(self, json_stream: TextIO | None = None) -> None:
        """Show the steps of a run.

        Args:
            json_stream: Stream that gets each step as a JSON line, as in metrics.jsonl with `seconds_left`; None: lines
                or a bar for people.
        """
        self.json_stream = json_stream
        self.screen: ProgressDisplay | None = None

    def start(self, run: Run) -> None:
        """Draw the bar if standard error is a terminal."""
        self.left = TimeLeft(run)
        if run.is_main_process and self.json_stream is None and errors_on_terminal():
            self.screen = ProgressDisplay(run)

    def step(self, run: Run, result: StepResult) -> None:
        """Show the step's figures."""
        if not run.is_main_process:
            return
        left = self.left.after(result)
        if self.screen is not None:
            self.screen.step(run, result, left)
        elif result.step % run.config.metrics.every_steps == 0:
            if self.json_stream is not None:
                metrics = step_metrics(result, run.train_state.platform, run.train_state.layout.topology.world)
                log_info(json.dumps({**metrics, "seconds_left": left}), stream=self.json_stream)
            else:
                what = [*figures(run, result), f"{duration(left)} left"]
                log_info(f"step {result.step} tokens {result.tokens:,} {' '.join(what)}")

    def save(self, run: Run, path: Path) -> None:
        """Show the step of the newest checkpoint."""
        if self.screen is not None:
            self.screen.saved(path)

    def stop(self, run: Run) -> None:
        """Stop drawing the bar, which stays on the screen."""
        if self.screen is not None:
            self.screen.close()
            self.screen = None


def figures(run: Run, result: StepResult) -> list[str]:
    """Return the figures of one step as texts, with MFU if the peak FLOP/s of the device are known."""
    texts = [f"loss {result.loss:.4f}", f"lr {result.lr:.2e}", f"norm {result.grad_norm:.3f}"]
    texts.append(f"{format_count(result.step_tokens / result.seconds)} tokens/s")
    peak = run.train_state.platform.peak_flops
    if peak is not None:
        texts.append(f"MFU {result.flops / result.seconds / (peak * run.train_state.layout.topology.world):.1%}")
    return texts


def part_done(settings: RunSettings, step: int, tokens: int) -> float:
    """Return the fraction of a run that is done: of its tokens, or of its steps if that is more."""
    return max(tokens / settings.tokens, step / settings.steps if settings.steps else 0.0)


class TimeLeft:
    """Estimates the wall-clock seconds to the end of the run, saves and evaluations included."""

    def __init__(self, run: Run) -> None:
        self.settings, self.speed, self.steps = run.config.run, 0.0, 0
        self.before, self.since = part_done(self.settings, run.progress.step, run.progress.tokens), time.monotonic()

    def after(self, result: StepResult) -> float:
        """Return the seconds left after a step."""
        done, now = part_done(self.settings, result.step, result.tokens), time.monotonic()
        latest = (done - self.before) / max(now - self.since, 1e-9)
        smoothed = SMOOTHED * self.speed + (1 - SMOOTHED) * latest
        # the first step compiles and warms up
        self.speed = smoothed if self.steps > 1 else latest
        self.before, self.since, self.steps = done, now, self.steps + 1
        return max(0.0, 1 - done) / max(self.speed, 1e-12)


class ProgressDisplay:
    """Two lines at the bottom of a terminal: how far the run is, and the figures of its latest step."""

    def __init__(self, run: Run) -> None:
        from rich.console import Console as RichConsole, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.text import Text

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        settings = run.config.run
        name = short_name(settings.size, run.config.model)
        self.bar = Progress(*columns)
        self.task = self.bar.add_task(f"{name} {settings.objective} {settings.phase}", total=1.0, left="")
        self.numbers = Text("", no_wrap=True, overflow="ellipsis")
        self.latest = f"checkpoint: step {run.progress.step}" if run.progress.step else "no checkpoint yet"
        self.figures: list[str] = []
        # the bar is on standard error; lines that go elsewhere than to this terminal are left alone
        self.live = Live(
            Group(self.bar, self.numbers),
            console=RichConsole(file=error_stream()),
            refresh_per_second=4,
            redirect_stdout=output_on_terminal(),
        )
        self.live.start()

    def step(self, run: Run, result: StepResult, left: float) -> None:
        """Show a step's figures, and the seconds that are left."""
        settings = run.config.run
        steps = f"step {result.step:,}" + (f" of {settings.steps:,}" if settings.steps else "")
        end = "" if settings.steps else f" of {format_count(settings.tokens)}"
        tokens = f"{format_count(result.tokens)}{end} tokens"
        done = min(1.0, part_done(settings, result.step, result.tokens))
        self.bar.update(self.task, completed=done, left=f"{duration(left)} left")
        self.figures = [steps, tokens, *figures(run, result)]
        self._show()

    def saved(self, path: Path) -> None:
        """Show a new checkpoint's step."""
        self.latest = f"checkpoint: step {step_of(path)}"
        self._show()

    def _show(self) -> None:
        self.numbers.plain = " · ".join([*self.figures, self.latest])

    def close(self) -> None:
        """Stop drawing."""
        self.live.stop()
