"""Take over a checkpoint's moments when the run's optimizer is not the one that wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.checkpoint.directory import read_config, read_progress
from megatron_ettin.config.schema import OptimConfig
from megatron_ettin.optim.adamw import stored_share

# optimizers whose state is the same two moments of each weight, debiased or raw
ALIKE = ("stable_adamw", "adamw")


@dataclass(frozen=True)
class MomentChange:
    """How the moments of a checkpoint are taken over."""

    kept: bool = True
    """False: the optimizer starts fresh, as after `--init-optimizer fresh`."""
    first: float = 1.0
    """Factor of the first moments."""
    second: float = 1.0
    """Factor of the second moments."""
    note: str = ""
    """What is done, for the line that says what the run goes on from; empty where nothing is."""


def moment_change(checkpoint: Path, optim: OptimConfig) -> MomentChange:
    """Return how the run's optimizer takes over the moments of a checkpoint that has an optimizer's state.

    StableAdamW keeps debiased moments and AdamW raw ones, so that what one wrote is scaled for the other: unscaled, an
    update after t others would be off by 1 - beta^t. Muon keeps other tensors, so going to or from it starts afresh.

    Args:
        checkpoint: its folder.
        optim: the optimizer of the run that loads it.

    Raises:
        UserError: its config.yaml or progress.json cannot be read.
    """
    theirs = read_config(checkpoint).get("optim") or {}
    name = theirs.get("name", optim.name)
    betas = [float(theirs.get(key, getattr(optim, key))) for key in ("beta1", "beta2")]
    updates = int(read_progress(checkpoint).get("updates", 0))
    if name != optim.name and not (name in ALIKE and optim.name in ALIKE):
        return MomentChange(False, note=f"{optim.name} starts with fresh moments: those of {name} are of another kind")
    if name not in ALIKE or updates < 1:
        return MomentChange()
    first, second = (
        stored_share(optim.name, new, updates) / stored_share(name, old, updates)
        for new, old in zip((optim.beta1, optim.beta2), betas, strict=True)
    )
    if first == second == 1:
        return MomentChange()
    changed = f"from {name} to {optim.name}" if name != optim.name else f"to the betas of this run's {name}"
    return MomentChange(True, first, second, f"moments converted {changed}")
