"""What a person sees of a run while it trains: a bar on a terminal, plain lines in a log, or JSON lines.

What a run that has ended says: what came out, where it lies, and what to do next."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TextIO

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.log import error_stream, errors_on_terminal, log_info, output_on_terminal
from megatron_ettin.base.text import duration, format_count
from megatron_ettin.checkpoint.directory import latest, list_checkpoints, read_progress, step_of
from megatron_ettin.config.schema import Config, RunSettings
from megatron_ettin.config.tables import short_name
from megatron_ettin.train.hooks.base import Hook, Run, step_metrics
from megatron_ettin.train.progress import Progress, is_done
from megatron_ettin.train.step import StepInfo

SMOOTHED = 0.9  # of the speed that the time left is told by, from step to step


class Console(Hook):
    """`json_stream`: where each line goes as JSON instead, as in metrics.jsonl."""

    def __init__(self, json_stream: TextIO | None = None) -> None:
        self.json_stream = json_stream
        self.screen: ProgressDisplay | None = None

    def start(self, run: Run) -> None:
        self.left = TimeLeft(run)
        if run.is_main_process and self.json_stream is None and errors_on_terminal():
            self.screen = ProgressDisplay(run)

    def step(self, run: Run, info: StepInfo) -> None:
        if not run.is_main_process:
            return
        left = self.left.after(info)
        if self.screen is not None:
            self.screen.step(run, info, left)
        elif info.step % run.config.metrics.every_steps == 0:
            if self.json_stream is not None:
                told = step_metrics(info, run.train_state.platform, run.train_state.layout.topology.world)
                log_info(json.dumps({**told, "seconds_left": left}), stream=self.json_stream)
            else:
                what = [*figures(run, info), f"{duration(left)} left"]
                log_info(f"step {info.step} tokens {info.tokens:,} {' '.join(what)}")

    def save(self, run: Run, path: Path) -> None:
        if self.screen is not None:
            self.screen.saved(path)

    def stop(self, run: Run) -> None:
        if self.screen is not None:
            self.screen.close()
            self.screen = None


def figures(run: Run, info: StepInfo) -> list[str]:
    """Of one step; MFU where the hardware's peak is known."""
    told = [f"loss {info.loss:.4f}", f"lr {info.lr:.2e}", f"norm {info.grad_norm:.3f}"]
    told.append(f"{format_count(info.step_tokens / info.seconds)} tokens/s")
    peak = run.train_state.platform.peak_flops
    if peak is not None:
        told.append(f"MFU {info.flops / info.seconds / (peak * run.train_state.layout.topology.world):.1%}")
    return told


def part_done(settings: RunSettings, step: int, tokens: int) -> float:
    """Of a run, which ends by tokens, and by steps where there are fewer of them."""
    return max(tokens / settings.tokens, step / settings.steps if settings.steps else 0.0)


class TimeLeft:
    """Seconds to the end of the run, by the wall clock: saves and evaluations count."""

    def __init__(self, run: Run) -> None:
        self.settings, self.speed, self.steps = run.config.run, 0.0, 0
        self.before, self.since = part_done(self.settings, run.progress.step, run.progress.tokens), time.monotonic()

    def after(self, info: StepInfo) -> float:
        done, now = part_done(self.settings, info.step, info.tokens), time.monotonic()
        latest = (done - self.before) / max(now - self.since, 1e-9)
        smoothed = SMOOTHED * self.speed + (1 - SMOOTHED) * latest
        self.speed = smoothed if self.steps > 1 else latest  # the first step compiles and warms up
        self.before, self.since, self.steps = done, now, self.steps + 1
        return max(0.0, 1 - done) / max(self.speed, 1e-12)


class ProgressDisplay:
    """Two lines at the bottom of a terminal: how far the run is, and the figures of its latest step."""

    def __init__(self, run: Run) -> None:
        from rich.console import Console as RichConsole, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.text import Text

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[at]}"))
        settings = run.config.run
        name = short_name(settings.size, run.config.model)
        self.bar = Progress(*columns)
        self.task = self.bar.add_task(f"{name} {settings.objective} {settings.phase}", total=1.0, at="")
        self.numbers = Text("", no_wrap=True, overflow="ellipsis")
        self.latest = f"checkpoint: step {run.progress.step}" if run.progress.step else "no checkpoint yet"
        self.told: list[str] = []
        # the bar is on standard error; lines that go elsewhere than to this terminal are left alone
        self.live = Live(
            Group(self.bar, self.numbers),
            console=RichConsole(file=error_stream()),
            refresh_per_second=4,
            redirect_stdout=output_on_terminal(),
        )
        self.live.start()

    def step(self, run: Run, info: StepInfo, left: float) -> None:
        settings = run.config.run
        steps = f"step {info.step:,}" + (f" of {settings.steps:,}" if settings.steps else "")
        end = "" if settings.steps else f" of {format_count(settings.tokens)}"
        tokens = f"{format_count(info.tokens)}{end} tokens"
        done = min(1.0, part_done(settings, info.step, info.tokens))
        self.bar.update(self.task, completed=done, at=f"{duration(left)} left")
        self.told = [steps, tokens, *figures(run, info)]
        self._show()

    def saved(self, path: Path) -> None:
        self.latest = f"checkpoint: step {step_of(path)}"
        self._show()

    def _show(self) -> None:
        self.numbers.plain = " · ".join([*self.told, self.latest])

    def close(self) -> None:
        self.live.stop()


def saved_progress(run_dir: Path) -> Progress | None:
    """Return where the newest checkpoint of a run stands; None where there is none. Raises UserError."""
    newest = latest(run_dir) if (run_dir / "checkpoints").is_dir() else None
    return None if newest is None else Progress.restored(read_progress(newest))


def is_finished(config: Config, run_dir: Path) -> bool:
    """Return whether the run's newest checkpoint has trained all it was asked to. Raises UserError."""
    saved = saved_progress(run_dir)
    return saved is not None and is_done(config, saved)


def complete_line(config: Config, run_dir: Path) -> str | None:
    """Return what to say at the start of a run that has nothing left to train; None where something is left."""
    try:
        saved = saved_progress(run_dir)
    except UserError:
        return None
    if saved is None or not is_done(config, saved):
        return None
    steps = config.run.steps
    behind = ""
    if steps is not None and steps < saved.step:
        behind = f", and run.steps={steps} is behind its step {saved.step:,}"
    return (
        f"{run_dir}: complete by its record{behind}; nothing is left to train (run.tokens or run.steps would have to be"
        " more)"
    )


def ending_lines(config: Config, run_dir: Path, progress: Progress, loss: float | None) -> list[str]:
    """Return what came out of a run, and what to do next. `loss`: of its last step; None where it made none."""
    done = is_done(config, progress)
    saved = list_checkpoints(run_dir)
    parts = [f"{run_dir}: {'complete' if done else 'stopped'} at step {progress.step:,}", f"{progress.tokens:,} tokens"]
    parts += [] if loss is None else [f"loss {loss:.4f}"]
    parts.append(f"checkpoint {saved[-1]}" if saved else "no checkpoint")
    if done:
        following = f"next: ettin report {run_dir}; ettin convert to-hf {run_dir} OUT"
    else:
        following = "next: the same command goes on from there"
    return [", ".join(parts), following]
