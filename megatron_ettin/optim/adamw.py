"""Implement AdamW and StableAdamW on the flat shards that core's optimizers hand out.

StableAdamW (Wortsman et al. 2023, arXiv 2304.13013; the original run's src/optimizer.py), per tensor, t = 1, 2, ...:
    b1 = (1 - beta1) / (1 - beta1^t);  b2 = beta2 (1 - beta2^(t-1)) / (1 - beta2^t)      (debiased in place)
    m += b1 (g - m);  v = b2 v + (1 - b2) g^2
    rms = sqrt(mean(g^2 / max(v, eps^2)));  lr' = lr / max(1, rms)
    p *= 1 - lr'/max_lr * weight_decay;  p -= lr' m / (sqrt(v) + eps)
`rms` is over the whole tensor. A shard knows only its part, so one vector with the sums of all tensors is all-reduced
per step. AdamW is the same without rms, in its usual bias-corrected form. In both, `weight_decay` is the share that a
weight loses per step at lr = max_lr, independent of the peak learning rate ("fully decoupled").

Compiled, StableAdamW's update is two kernels per tensor. Its cost is memory traffic: 36 bytes per weight (gradient,
moments read and written; then moments, weight read and written), a third of that of one operation at a time. Values
that change between steps are passed as tensors on the device, so nothing is recompiled and the host never waits to read
a clip factor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_ettin.platform.compile import compile_enabled, maybe_compile


@dataclass(frozen=True)
class ParamInfo:
    """Description of a whole parameter, used by its shards."""

    index: int
    """Index in the vector of sums, which has one sum for each parameter."""
    numel: int
    """Elements of the whole tensor, without rows that pad it."""
    is_counted: bool
    """Whether this rank adds its values to the sums; False if another tensor-parallel rank adds the same."""


@dataclass(frozen=True)
class TiedCopies:
    """The tied embedding, if the first and the last pipeline stage each hold a copy of it."""

    index: int
    """Index of this rank's copy in the vector of sums."""
    group: Any
    """Process group of the ranks that hold the same shard of it; its first rank is in the first stage."""


@dataclass(frozen=True)
class ShardSlice:
    """The part of a rank's tensor that belongs to one parameter. ZeRO stores many parameters in one flat tensor."""

    param: ParamInfo
    elements: slice = field(default_factory=lambda: slice(None))
    """Range in the first dimension; all by default."""


class DecoupledAdamW(torch.optim.AdamW):
    """AdamW with fully decoupled weight decay.

    Core's DistributedOptimizer requires an AdamW, and replaces the parameters in its groups by flat fp32 shards (views,
    on which no optimizer could be built afterwards). So this one is built on whole parameters and bound to shards.
    """

    device = torch.device("cpu")
    """Device of the sums. The engines set it, because a rank without shards has no parameter to take it from."""
    tied: TiedCopies | None = None
    """The tied embedding; `build_optimizer` sets it on the pipeline stages that hold a copy."""

    def bind(self, slices: Mapping[torch.Tensor, Sequence[ShardSlice]], num_params: int, group: Any) -> None:
        """Set which parameters each updated tensor consists of, and allocate their moments.

        Args:
            slices: this rank's updated tensor -> the parameters in it.
            num_params: length of the vector of sums.
            group: process group to all-reduce the sums over, or None.
        """
        self.slices, self.num_params, self.sum_group = dict(slices), num_params, group
        for p in self.slices:
            if not self.state[p]:
                self.state[p].update(self._new_state(p))

    def _new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.zeros_like(p.data), "exp_avg_sq": torch.zeros_like(p.data)}

    @property
    def updates(self) -> int:
        """Return the number of updates, which is kept in the groups.

        Core's loader would copy it as a tensor if it were a per-parameter state.
        """
        return int(self.param_groups[0].get("updates", 0))

    @updates.setter
    def updates(self, value: int) -> None:
        for group in self.param_groups:
            group["updates"] = int(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update this rank's shards; needs no communication."""
        self.updates = t = self.updates + 1
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            scale, correction = group["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                self._decay(p, group, group["lr"])
                denominator = state["exp_avg_sq"].sqrt().div_(correction).add_(eps)
                p.addcdiv_(state["exp_avg"], denominator, value=-scale)

    @torch.no_grad()
    def scale_moments(self, first: float, second: float) -> None:
        """Multiply every first and every second moment by a factor."""
        if first == second == 1:
            return
        for state in self.state.values():
            for name, factor in (("exp_avg", first), ("exp_avg_sq", second)):
                if name in state:
                    state[name].mul_(factor)

    @staticmethod
    def _decay(p: torch.Tensor, group: dict[str, Any], lr: float) -> None:
        weight_decay = group["weight_decay"] * group["wd_mult"]
        if weight_decay:
            p.mul_(1 - lr / group["max_lr"] * weight_decay)


def stored_share(optimizer: str, beta: float, updates: int) -> float:
    """Return the share of a debiased moment that an optimizer keeps in its state.

    StableAdamW debiases its moments in place. AdamW keeps raw ones, which after t updates are 1 - beta^t of debiased
    ones (Kingma & Ba 2015, arXiv 1412.6980, section 3).

    Args:
        optimizer: `stable_adamw` or `adamw`.
        beta: beta1 for a first moment, beta2 for a second one.
        updates: t, at least 1.
    """
    return 1.0 if optimizer == "stable_adamw" else 1 - beta**updates


class StableAdamW(DecoupledAdamW):
    """StableAdamW, as in the module docstring. Every rank of `sum_group` must call `step`, with or without shards."""

    def bind(self, slices: Mapping[torch.Tensor, Sequence[ShardSlice]], num_params: int, group: Any) -> None:
        """Bind the shards, and keep the number of elements of each parameter on the device."""
        super().bind(slices, num_params, group)
        known = {part.param.index: part.param.numel for parts in self.slices.values() for part in parts}
        numels = [float(known.get(i, 1)) for i in range(num_params)]
        self._numels = torch.tensor(numels, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update this rank's shards (collective over `sum_group`)."""
        self.updates = t = self.updates + 1
        sums = torch.zeros_like(self._numels)
        self._scalars: dict[float, torch.Tensor] = {}
        for group, p in self._with_gradients():
            self._update_moments(group, p, t, sums)
        if self.sum_group is not None:
            dist.all_reduce(sums, group=self.sum_group)
        if self.tied is not None:
            # all copies need the same factor, but each stage may have summed its parts in another order
            first = dist.get_global_rank(self.tied.group, 0)
            dist.broadcast(sums[self.tied.index : self.tied.index + 1], src=first, group=self.tied.group)
        clips = (sums / self._numels).sqrt_().clamp_(min=1)
        # reading them waits for the device: once, and only if an update is not compiled
        on_host: Callable[[], list[float]] = functools.cache(clips.tolist)
        for group, p in self._with_gradients():
            self._update_weights(group, p, clips, on_host)

    def _update_moments(self, group: dict[str, Any], p: torch.Tensor, t: int, sums: torch.Tensor) -> None:
        (beta1, beta2), eps, state, g = group["betas"], group["eps"], self.state[p], p.grad
        assert g is not None
        b1 = (1 - beta1) / (1 - beta1**t)
        b2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        if self._is_compiled(p):
            param = self.slices[p][0].param
            flat = (_flat(g), _flat(state["exp_avg"]), _flat(state["exp_avg_sq"]))
            total = update_moments(*flat, self._scalar(b1), self._scalar(b2), eps * eps)
            if param.is_counted:
                sums[param.index] = total
            return
        state["exp_avg"].lerp_(g, b1)
        squared = g * g
        state["exp_avg_sq"].mul_(b2).add_(squared, alpha=1 - b2)
        squared.div_(state["exp_avg_sq"].clamp(min=eps * eps))
        for part in self.slices[p]:
            if part.param.is_counted:
                sums[part.param.index] += squared[part.elements].sum()

    def _update_weights(
        self, group: dict[str, Any], p: torch.Tensor, clips: torch.Tensor, on_host: Callable[[], list[float]]
    ) -> None:
        """Update a tensor. `clips`: divisors of each parameter's learning rate, float64 on the device."""
        m, v, eps = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], group["eps"]
        if self._is_compiled(p):
            rate = (group["lr"] / clips[self.slices[p][0].param.index]).to(p.dtype)
            kept = 1 - rate * (group["weight_decay"] * group["wd_mult"] / group["max_lr"])
            update_weights(_flat(p), _flat(m), _flat(v), rate, kept, eps)
            return
        denominator = v.sqrt().add_(eps)
        for part in self.slices[p]:
            lr, weights = group["lr"] / on_host()[part.param.index], p[part.elements]
            self._decay(weights, group, lr)
            weights.addcdiv_(m[part.elements], denominator[part.elements], value=-lr)

    def _is_compiled(self, p: torch.Tensor) -> bool:
        """Return whether compiled kernels update `p`.

        They do not update ZeRO's tensors of several parameters and those that it keeps in host memory.
        """
        parts = self.slices[p]
        is_one = len(parts) == 1 and parts[0].elements == slice(None)
        return compile_enabled() and is_one and p.device == self._numels.device and p.is_contiguous()

    def _scalar(self, value: float) -> torch.Tensor:
        """Return a scalar on the device, made once per step; filled, because a copy from the host could wait."""
        if value not in self._scalars:
            self._scalars[value] = torch.full((), value, device=self._numels.device)
        return self._scalars[value]

    def _with_gradients(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` flattened, itself if it is flat, because the compiler makes a kernel for each base of a view."""
    return tensor if tensor.ndim == 1 else tensor.view(-1)


@functools.partial(maybe_compile, dynamic=True)
def update_moments(
    gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, b1: torch.Tensor, b2: torch.Tensor, floor: float
) -> torch.Tensor:
    """Update both moments in place with the step's `b1` and `b2`, and return the sum of g^2 / max(v, floor)."""
    squared = gradient * gradient
    m.add_((gradient - m) * b1)
    v.mul_(b2).add_(squared * (1 - b2))
    return (squared / v.clamp(min=floor)).sum()


@functools.partial(maybe_compile, dynamic=True)
def update_weights(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, lr: torch.Tensor, kept: torch.Tensor, eps: float
) -> None:
    """Update `p` in place at the clipped learning rate `lr`; `kept`: the share of a weight that the decay leaves."""
    p.mul_(kept).sub_(lr * m / (v.sqrt() + eps))
