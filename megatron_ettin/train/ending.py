"""What a run that has ended says: what came out, where it lies, and what to do next."""

from __future__ import annotations

from pathlib import Path

from megatron_ettin.checkpoint.directory import latest, list_checkpoints, read_progress
from megatron_ettin.config.errors import UserError
from megatron_ettin.config.schema import Config
from megatron_ettin.train.progress import Progress, is_done


def is_finished(config: Config, run_dir: Path) -> bool:
    """Return whether the run's newest checkpoint has trained all it was asked to."""
    if not (run_dir / "checkpoints").is_dir():
        return False
    newest = latest(run_dir)
    if newest is None:
        return False
    saved = read_progress(newest)
    return is_done(config, Progress(int(saved.get("step", 0)), int(saved.get("tokens", 0))))


def complete_line(config: Config, run_dir: Path) -> str | None:
    """Return what to say at the start of a run that has nothing left to train; None where something is left."""
    try:
        if not is_finished(config, run_dir):
            return None
    except UserError:
        return None
    return (
        f"{run_dir}: complete by its record; nothing is left to train (run.tokens or run.steps would have to be more)"
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
