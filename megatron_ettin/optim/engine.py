"""Define the interface between the trainer and a data-parallel engine.

Two engines implement it: `MegatronEngine` (optim/megatron.py) around core's optimizers, and `DeepSpeedEngine`
(optim/deepspeed.py) around DeepSpeed's ZeRO. A step calls `zero_grad`, `schedule()`, `prepare`, `update` and `norm`.
Methods that not every engine needs have a default: core's schedule, the unchanged weights, or nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin.optim.adamw import DecoupledAdamW


class TrainEngine(Protocol):
    """Interface of a data-parallel engine to the trainer, checkpoints and benchmarks."""

    inner: DecoupledAdamW
    """The optimizer that updates this rank's shards."""
    can_skip: bool = True
    """Whether the gradient norm is known before the update, so that a bad step's update can be left out."""

    def zero_grad(self) -> None:
        """Clear the gradients before a step, unless the engine clears them after each step."""
        return

    def schedule(self) -> Callable[..., Any]:
        """Return the function that runs a step's micro-batches, called like core's forward-backward schedules.

        By default it is core's own.
        """
        schedule: Callable[..., Any] = get_forward_backward_func()
        return schedule

    def call_before_sum(self, callback: Callable[[], None]) -> None:
        """Register `callback` to run in each step before gradients are first summed over ranks."""

    def prepare(self) -> None:
        """Reduce the gradients and compute their global norm, without waiting for the device (collective).

        An engine that does this in `update` leaves this method empty.
        """
        return

    def update(self, lr: float) -> None:
        """Update every weight from the prepared gradients at learning rate `lr` (collective)."""

    def norm(self) -> float:
        """Return the step's global gradient norm before clipping; waits for the device."""

    def finish_param_sync(self) -> None:
        """Wait for gathers of updated weights that overlap with the next forward pass.

        Needed before anything but that pass reads the weights: a checkpoint, an evaluation, a comparison.
        """
        return

    def summon_full_params(self, writing: bool = False) -> contextlib.AbstractContextManager[None]:
        """Make the model's weights readable, and writable if `writing`, inside the context (collective)."""

    def sharded_state(self, model_state: dict[str, Any], loading: bool) -> Any:
        """Return masters and moments as sharded tensors with the shapes of whole parameters (collective).

        The keys `optimizer.state.{param,exp_avg,exp_avg_sq}.<name>` are the same for every engine and layout.

        Args:
            model_state: sharded tensors of the model, by chunk and name.
            loading: whether a checkpoint will be read into the result.
        """

    def load_sharded_state(self, state: Any, updates: int) -> None:
        """Take over the tensors of `sharded_state`, read from a checkpoint, and its count of `updates` (collective)."""

    def reload_master_weights(self, exact: Mapping[int, torch.Tensor] | None = None) -> None:
        """Set the fp32 masters from the model's present weights, after loading weights alone.

        Args:
            exact: id of a parameter stored in FP8 -> the value it was cast from, which its master starts at.
        """

    def weights_to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded tensors that a checkpoint stores as the model's weights.

        By default these are those of `model_state`.
        """
        return model_state

    def close(self) -> None:
        """Release the state that the engine keeps outside of its own objects."""
        return
