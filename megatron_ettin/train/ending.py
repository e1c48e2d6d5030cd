"""What a run that has ended says: what came out, where it lies, and what to do next."""

from __future__ import annotations

from pathlib import Path

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.directory import latest, list_checkpoints, read_progress
from megatron_ettin.config.schema import Config
from megatron_ettin.train.progress import Progress, is_done


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
