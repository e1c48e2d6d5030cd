"""Step a model by hand from scripts and notebooks. `megatron_ettin.api` exports these names.

Importing this module is cheap; torch and Megatron-Core are imported when a model is built.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ettin.base.errors import UserError, warn_renamed
from megatron_ettin.config.schema import Config

if TYPE_CHECKING:
    import torch

    from megatron_ettin.batching.batches import Batches
    from megatron_ettin.train.progress import StepResult
    from megatron_ettin.train.setup import TrainState


@dataclass
class Model:
    """A model with its optimizer (under torchrun or srun this rank's part of both), made by `build_model`."""

    config: Config
    """The run's configuration."""
    train_state: TrainState
    """Model chunks, optimizer and layout of this rank (not part of the stable interface)."""
    step: int = 0
    """Number of steps trained so far."""
    tokens: int = 0
    """Number of tokens trained on so far."""

    @property
    def machine(self) -> TrainState:
        """Former name of `train_state` (deprecated)."""
        warn_renamed("Model.machine", "Model.train_state")
        return self.train_state

    @property
    def module(self) -> torch.nn.Module:
        """First model chunk of this rank, which is the whole model unless it is split over pipeline stages."""
        return self.train_state.model_chunks[0]

    @functools.cached_property
    def batches(self) -> Batches:
        """Micro-batches of the run's steps on this rank's device."""
        from megatron_ettin.batching.batches import Batches
        from megatron_ettin.train.job import open_training_data

        train_state = self.train_state
        return Batches.of(self.config, open_training_data(self.config), train_state.layout, train_state.platform.device)

    def logits(self, token_lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Compute the logits of lists of token ids, each a document of its own.

        Args:
            token_lists: token ids; the lists may differ in length.

        Returns:
            A tensor [n, vocabulary] for each list of n tokens, on the model's device.

        Raises:
            UserError: there is more than one rank.
        """
        from megatron_ettin.evaluate.inference import compute_logits

        if self.train_state.layout.topology.world > 1:
            raise UserError("logits: need a model in one process; start the script without torchrun")
        logits = compute_logits(self.module, token_lists, self.train_state.platform.device)
        self.module.train()
        return logits


@contextlib.contextmanager
def build_model(config: Config, checkpoint: str | PathLike[str] | None = None) -> Iterator[Model]:
    """Build the model of a run for a `with` block (collective). Only one model can exist at a time.

    Megatron-Core keeps its process groups in globals, which are destroyed after the block.

    Args:
        config: the run.
        checkpoint: a checkpoint, a run (its latest checkpoint) or a Hugging Face folder to load weights from. None
            takes the run's initial weights.

    Yields:
        The model, in training mode, at step 0.

    Raises:
        UserError: for a layout that these ranks cannot have, or weights that do not fit.
    """
    from megatron_ettin.convert.from_hf import as_checkpoint
    from megatron_ettin.parallel.env import read_distributed_env
    from megatron_ettin.parallel.groups import destroy_model_parallel
    from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
    from megatron_ettin.platform import detect
    from megatron_ettin.train import resume
    from megatron_ettin.train.setup import setup_training

    env = read_distributed_env()
    platform = detect(config.runtime.device, env.local_rank)
    init_process_group(env, platform)
    train_state = None
    try:
        train_state = setup_training(config, platform, env.world, initial_weights=checkpoint is None)
        if checkpoint is not None:
            with as_checkpoint(Path(checkpoint)) as path:
                resume.load(train_state, path, with_optimizer=False)
        yield Model(config, train_state)
    finally:
        if train_state is not None:
            train_state.close()
        destroy_model_parallel()
        destroy_process_group()


def run_step(model: Model, lr: float | None = None) -> StepResult:
    """Train the run's next step: read its rows, run forward and backward, update the weights (collective).

    Args:
        model: from `build_model`; its `step` and `tokens` advance.
        lr: learning rate of this step; None takes that of the schedule.

    Returns:
        Loss, gradient norm, counts and seconds of the step, equal on every rank except for the seconds.

    Raises:
        UserError: for data that is missing, damaged or made for another vocabulary.
    """
    from megatron_ettin.optim.schedule import lr_fraction
    from megatron_ettin.train.progress import Progress
    from megatron_ettin.train.step import train_step

    config = model.config
    if lr is None:
        lr = config.optim.lr * lr_fraction(model.tokens, config.schedule, config.run.tokens)
    model.train_state.progress = Progress(model.step, model.tokens)
    result = train_step(model.train_state, model.batches, lr)
    model.step, model.tokens = result.step, result.tokens
    return result
