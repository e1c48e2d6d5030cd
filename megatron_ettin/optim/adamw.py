"""AdamW and StableAdamW on the flat shards that core's optimizers hand out.

StableAdamW (Wortsman et al. 2023, arXiv 2304.13013; the original run's src/optimizer.py), per tensor, t = 1, 2, ...:
    b1 = (1 - beta1) / (1 - beta1^t);  b2 = beta2 (1 - beta2^(t-1)) / (1 - beta2^t)      (debiased in place)
    m += b1 (g - m);  v = b2 v + (1 - b2) g^2
    rms = sqrt(mean(g^2 / max(v, eps^2)));  lr' = lr / max(1, rms)
    p *= 1 - lr'/max_lr * weight_decay;  p -= lr' m / (sqrt(v) + eps)
`rms` is over the whole tensor. A shard knows only its part, so the sums of all tensors travel in one all-reduced
vector a step. AdamW is the same without rms, in its usual bias-corrected form. In both, `weight_decay` is what a
weight loses a step at lr = max_lr, whatever the learning rate is ("fully decoupled").

StableAdamW's update in two kernels a tensor. It costs the memory it goes through: here 36 bytes a weight (gradient,
moments read and written; then moments, weight read and written), as single operations three times that. Whatever
differs between steps comes as a tensor on the device: nothing is compiled anew, and the host never waits to learn a
clip. Both are adamw.py's formulas; all tensors are flat and fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_ettin.platform.compile import compile_enabled, maybe_compile_dynamic


@dataclass(frozen=True)
class ParamInfo:
    """What a shard needs to know of the tensor it is part of."""

    index: int  # in the vector of sums
    numel: int  # of the whole tensor, without rows that only pad it
    counts: bool  # False where another rank counts the same values (replicated over tensor parallelism)


@dataclass(frozen=True)
class TiedCopies:
    """The tied embedding where first and last pipeline stage each hold a copy of it."""

    index: int
    """Of this rank's copy in the vector of sums."""
    group: Any
    """The ranks that hold the same part of it; its first is of the first stage."""


@dataclass(frozen=True)
class ShardSlice:
    """Part of a flat shard (ZeRO lays many tensors in one), or all of a tensor that is not flat."""

    whole: ParamInfo
    at: slice = field(default_factory=lambda: slice(None))  # of the shard's first dimension


class DecoupledAdamW(torch.optim.AdamW):
    """AdamW with fully decoupled weight decay. Core's DistributedOptimizer insists on an AdamW and replaces the
    param_groups in place by flat fp32 shards (views, which no optimizer could be built on afterwards)."""

    device = torch.device("cpu")  # set by `build_optimizer`: a rank without shards has no parameter to ask
    tied: TiedCopies | None = None  # set by `build_optimizer` on the stages that hold a copy

    def bind(self, tensors: Mapping[torch.Tensor, Sequence[ShardSlice]], length: int, group: Any) -> None:
        """Tell which tensors each shard has pieces of; sums of `length` tensors are all-reduced over `group`."""
        self.tensors, self.length, self.sum_group = dict(tensors), length, group
        for p in self.tensors:
            if not self.state[p]:
                self.state[p].update(self._new_state(p))

    def _new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.zeros_like(p.data), "exp_avg_sq": torch.zeros_like(p.data)}

    @property
    def updates(self) -> int:
        """Steps taken. Kept in the groups: core's re-sharding loader copies every per-parameter state as a tensor."""
        return int(self.param_groups[0].get("updates", 0))

    @updates.setter
    def updates(self, value: int) -> None:
        for group in self.param_groups:
            group["updates"] = int(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
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
    """Return what part of a debiased moment an optimizer keeps in its state.

    StableAdamW debiases its moments in place. AdamW keeps raw ones: after t updates 1 - beta^t of them (Kingma &
    Ba 2015, arXiv 1412.6980, section 3).

    Args:
        optimizer: `stable_adamw` or `adamw`.
        beta: beta1 of a first moment, beta2 of a second one.
        updates: t, at least 1.
    """
    return 1.0 if optimizer == "stable_adamw" else 1 - beta**updates


@dataclass
class _Clips:
    """What each tensor's learning rate is divided by, float64 on the device."""

    tensor: torch.Tensor

    @functools.cached_property
    def values(self) -> list[float]:
        """Read back, which waits for the device."""
        return self.tensor.tolist()


class StableAdamW(DecoupledAdamW):
    """The module docstring's update. Every rank of `sum_group` must call step, shards or none."""

    def bind(self, tensors: Mapping[torch.Tensor, Sequence[ShardSlice]], length: int, group: Any) -> None:
        super().bind(tensors, length, group)
        wholes = {piece.whole.index: piece.whole.numel for pieces in self.tensors.values() for piece in pieces}
        numels = [float(wholes.get(i, 1)) for i in range(length)]
        self._numels = torch.tensor(numels, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.updates = t = self.updates + 1
        sums = torch.zeros_like(self._numels)
        self._scalars: dict[float, torch.Tensor] = {}
        for group, p in self._with_gradients():
            self._update_moments(group, p, t, sums)
        if self.sum_group is not None:
            dist.all_reduce(sums, group=self.sum_group)
        if self.tied is not None:
            # one clip for all copies: each stage may have added the parts of its own in another order
            first = dist.get_global_rank(self.tied.group, 0)
            dist.broadcast(sums[self.tied.index : self.tied.index + 1], src=first, group=self.tied.group)
        clips = _Clips((sums / self._numels).sqrt_().clamp_(min=1))
        for group, p in self._with_gradients():
            self._update_weights(group, p, clips)

    def _update_moments(self, group: dict[str, Any], p: torch.Tensor, t: int, sums: torch.Tensor) -> None:
        (beta1, beta2), eps, state, g = group["betas"], group["eps"], self.state[p], _gradient(p)
        b1 = (1 - beta1) / (1 - beta1**t)
        b2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        if self._is_fused(p):
            whole = self.tensors[p][0].whole
            flat = (_flat(g), _flat(state["exp_avg"]), _flat(state["exp_avg_sq"]))
            found = update_moments(*flat, self._scalar(b1), self._scalar(b2), eps * eps)
            if whole.counts:
                sums[whole.index] = found
            return
        state["exp_avg"].lerp_(g, b1)
        squared = g * g
        state["exp_avg_sq"].mul_(b2).add_(squared, alpha=1 - b2)
        squared.div_(state["exp_avg_sq"].clamp(min=eps * eps))
        for piece in self.tensors[p]:
            if piece.whole.counts:
                sums[piece.whole.index] += squared[piece.at].sum()

    def _update_weights(self, group: dict[str, Any], p: torch.Tensor, clips: _Clips) -> None:
        m, v, eps = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], group["eps"]
        if self._is_fused(p):
            rate = (group["lr"] / clips.tensor[self.tensors[p][0].whole.index]).to(p.dtype)
            kept = 1 - rate * (group["weight_decay"] * group["wd_mult"] / group["max_lr"])
            update_weights(_flat(p), _flat(m), _flat(v), rate, kept, eps)
            return
        denominator = v.sqrt().add_(eps)
        for piece in self.tensors[p]:
            lr, part = group["lr"] / clips.values[piece.whole.index], p[piece.at]
            self._decay(part, group, lr)
            part.addcdiv_(m[piece.at], denominator[piece.at], value=-lr)

    def _is_fused(self, p: torch.Tensor) -> bool:
        """Not of ZeRO's flat tensors, which have pieces of several weights, nor of those it keeps in host memory."""
        pieces = self.tensors[p]
        whole = len(pieces) == 1 and pieces[0].at == slice(None)
        return compile_enabled() and whole and p.device == self._numels.device and p.is_contiguous()

    def _scalar(self, value: float) -> torch.Tensor:
        """On the device, once a step; filled there, because a copy from the host could wait."""
        if value not in self._scalars:
            self._scalars[value] = torch.full((), value, device=self._numels.device)
        return self._scalars[value]

    def _with_gradients(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A view only where it has to be: the compiler makes another kernel for each kind of tensor behind a view."""
    return tensor if tensor.ndim == 1 else tensor.view(-1)


def _gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


@maybe_compile_dynamic
def update_moments(
    gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, b1: torch.Tensor, b2: torch.Tensor, floor: float
) -> torch.Tensor:
    """Both moments in place, `b1` and `b2` being those of the step; returns the sum of g^2 / max(v, floor)."""
    squared = gradient * gradient
    m.add_((gradient - m) * b1)
    v.mul_(b2).add_(squared * (1 - b2))
    return (squared / v.clamp(min=floor)).sum()


@maybe_compile_dynamic
def update_weights(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, lr: torch.Tensor, kept: torch.Tensor, eps: float
) -> None:
    """`p` in place at the clipped learning rate `lr`; `kept`: what the decay leaves of a weight."""
    p.mul_(kept).sub_(lr * m / (v.sqrt() + eps))
