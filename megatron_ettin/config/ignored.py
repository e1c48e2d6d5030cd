"""Report keys that a user set and that the run at hand does not read: another run may have been meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_ettin.config.layers import split_words
from megatron_ettin.config.objectives import OBJECTIVES
from megatron_ettin.config.schema import Config


def unread(config: Config) -> dict[str, str]:
    """Return key -> why the run does not read it."""
    objective, name = OBJECTIVES[config.run.objective], config.run.objective
    found = {}
    if not objective.needs_mask_token:
        found["data.mlm_probability"] = f"{name} masks no token"
    if objective.causal:
        found["model.encoder_window"] = f"{name} has no bidirectional rows"
    elif not objective.is_hybrid:
        found["model.decoder_window_keys"] = f"{name} has no causal rows"
    if config.data.validation is None:
        found |= dict.fromkeys(("metrics.eval_every_steps", "metrics.eval_rows"), "data.validation is not set")
    if config.batch.warmup_tokens == 0:
        found["batch.warmup_min_rows"] = "batch.warmup_tokens is 0"
    if config.optim.name != "muon":
        found |= dict.fromkeys(("optim.momentum", "optim.adjust_lr"), f"optim.name is {config.optim.name}")
    return found


def ignored_lines(config: Config, given: Collection[str]) -> list[str]:
    """Return a line for each key of `given` without effect, and for a validation that has no cadence."""
    lines = [f"{key}: has no effect, for {why}" for key, why in unread(config).items() if key in given]
    if config.data.validation is not None and config.metrics.eval_every_steps is None:
        lines.append(
            "data.validation: evaluated at the end of the run only; metrics.eval_every_steps=N does on the way"
        )
    return lines


def phase_lines(words: Sequence[str], phases: Collection[str]) -> list[str]:
    """Return a line for each override of a phase that is not among those of the run."""
    of_phase = split_words(words)[1]
    return [
        f"{phase}.{word}: has no effect, for this run is of {', '.join(phases)}"
        for phase, its_words in of_phase.items()
        if phase not in phases
        for word in its_words
    ]
