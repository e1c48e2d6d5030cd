"""Compute cross entropy of a linear output layer, in chunks of rows, over a vocabulary split by tensor parallelism.

The fp32 logits of a whole micro-batch never exist: each chunk's logits become its loss and immediately its gradients
for hidden states, weight and bias (three matrix products per chunk, as in the plain computation, none repeated in
backward). The price: the loss must be a sum that is only scaled by one number afterwards, as training's is.
The vocabulary-parallel softmax is that of Megatron-LM (arXiv 1909.08053): maxima and sums are all-reduced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_ettin.config.tables import CHUNK_LOGITS_BYTES, DEVICE_CHUNK_ROWS, FEWEST_CHUNK_ROWS
from megatron_ettin.platform.compile import compile_enabled, maybe_compile


class LossOutput(NamedTuple):
    """Result of the last pipeline stage for a micro-batch with n labels."""

    total: torch.Tensor
    """Sum of the losses, fp32 scalar; the only differentiable one."""
    losses: torch.Tensor
    """Loss of each label in flat order, fp32 [n]."""
    correct: torch.Tensor
    """Whether each label was the most likely token, bool [n]; False in passes that make gradients."""


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss: the rank's part of the vocabulary, padding of the labels, and scale of the gradients."""

    first: int = 0
    """Index of this rank's first row in the vocabulary."""
    valid: int = sys.maxsize
    """Number of this rank's rows that are not padding; all by default."""
    group: Any = None
    """The tensor-parallel group; None if the vocabulary is not sharded."""
    padded: bool = False
    """True if some labels are negative. Their losses and gradients are zero."""
    factor: float = 1.0
    """The number that the caller will multiply the sum by.

    Gradients in 16 bits are multiplied by it before they are rounded, so that backward multiplies by 1. Backward would
    round the factor to bf16, which changes all gradients of a micro-batch by the same share, up to 0.4 %.
    """


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        options: tuple[LossOptions, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        vocab, wants_gradients = options
        group, factor = vocab.group, vocab.factor
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
        grads = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=torch.float32),
            torch.zeros_like(bias, dtype=torch.float32),
        )
        rows = max(FEWEST_CHUNK_ROWS, CHUNK_LOGITS_BYTES // (4 * weight.shape[0]))
        if wants_gradients and compile_enabled():
            rows = rows if hidden.device.type == "cpu" else DEVICE_CHUNK_ROWS
            for start in range(0, len(labels), rows):
                part = slice(start, start + rows)
                chunk_grads = (grads[0][part], grads[1], grads[2])
                losses[part] = _compiled_chunk(hidden[part], weight, bias, labels[part], chunk_grads, vocab)
        else:
            # all chunks use the same memory: on a CPU the page faults of new tensors cost as much as the products
            logits = hidden.new_empty(min(rows, len(labels)), weight.shape[0])
            log_softmax = torch.empty_like(logits, dtype=torch.float32)
            for start in range(0, len(labels), rows):
                part = slice(start, min(start + rows, len(labels)))
                n = part.stop - start
                torch.mm(hidden[part], weight.t(), out=logits[:n]).add_(bias)
                log_probs = _log_softmax(logits[:n], vocab.valid, group, out=log_softmax[:n])
                column = (labels[part] - vocab.first).clamp(0, weight.shape[0] - 1)[:, None]
                is_local = (labels[part] >= vocab.first) & (labels[part] < vocab.first + weight.shape[0])
                target = torch.where(is_local, log_probs.gather(1, column).squeeze(1), 0.0)
                losses[part] = -_all_reduce(target, dist.ReduceOp.SUM, group)
                if wants_gradients:
                    softmax = log_probs.exp_()
                    if vocab.padded:
                        softmax.mul_((labels[part] >= 0)[:, None])
                    logit_grad = softmax.scatter_add_(1, column, -is_local.to(softmax.dtype)[:, None])
                    _accumulate(logit_grad, hidden[part], weight, (grads[0][part], grads[1], grads[2]), factor)
                else:
                    # one more pass over the logits, in evaluation only
                    correct[part] = -losses[part] >= _all_reduce(log_probs.amax(dim=1), dist.ReduceOp.MAX, group)
        ctx.factor = factor
        if wants_gradients:
            _all_reduce(grads[0], dist.ReduceOp.SUM, group)
            if factor != 1:
                grads[2].mul_(factor)
            ctx.save_for_backward(grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype))
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        remaining = upstream[0] / ctx.factor
        return (*(grad.mul_(remaining.to(grad.dtype)) for grad in ctx.saved_tensors), None, None)


def _compiled_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    grads: tuple[torch.Tensor, ...],
    vocab: LossOptions,
) -> torch.Tensor:
    """Return the losses of some rows and add their gradients to `grads`; logits are never stored in fp32."""
    group, factor = vocab.group, vocab.factor
    logits = torch.mm(hidden, weight.t())
    normaliser, target = shard_statistics(logits, bias, labels, vocab.first, vocab.valid)
    if group is not None:
        normaliser = _logsumexp_over(normaliser, group)
        _all_reduce(target, dist.ReduceOp.SUM, group)
    logit_grad, bias_grad = logit_gradient(logits, bias, labels, normaliser, vocab.first, vocab.valid)
    grads[2].add_(bias_grad)
    _product(logit_grad, weight, factor, out=grads[0])
    grads[1].add_(_product(logit_grad.t(), hidden, factor))
    return torch.where(labels >= 0, normaliser - target, 0.0)


def _masked_logits(logits: torch.Tensor, bias: torch.Tensor, valid: int) -> torch.Tensor:
    """Return fp32 logits with bias; columns that pad the vocabulary are -inf."""
    values = logits.float() + bias.float()
    if valid == logits.shape[1]:
        return values
    return torch.where(torch.arange(logits.shape[1], device=logits.device) < valid, values, float("-inf"))


@maybe_compile
def shard_statistics(
    logits: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, first: int, valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's log-sum-exp over this shard and its label's logit (0 if in another shard), both fp32 [n]."""
    values, column = _masked_logits(logits, bias, valid), labels - first
    is_local = (column >= 0) & (column < logits.shape[1])
    target = values.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.logsumexp(values, dim=1), torch.where(is_local, target, 0.0)


@maybe_compile
def logit_gradient(
    logits: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    normaliser: torch.Tensor,
    first: int,
    valid: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax - one_hot in the logits' type, and its sum over the rows in fp32."""
    softmax = (_masked_logits(logits, bias, valid) - normaliser[:, None]).exp()
    one_hot = torch.arange(logits.shape[1], device=logits.device)[None] == (labels - first)[:, None]
    gradient = torch.where((labels >= 0)[:, None], softmax - one_hot.to(softmax.dtype), 0.0)
    return gradient.to(logits.dtype), gradient.sum(dim=0)


def _all_reduce(values: torch.Tensor, operation: Any, group: Any) -> torch.Tensor:
    """All-reduce `values` in place over the vocabulary's shards."""
    if group is not None:
        dist.all_reduce(values, op=operation, group=group)
    return values


def _logsumexp_over(shards: torch.Tensor, group: Any) -> torch.Tensor:
    """Return log-sum-exp over the whole vocabulary from each shard's (collective)."""
    top = _all_reduce(shards.clone(), dist.ReduceOp.MAX, group)
    return top + _all_reduce((shards - top).exp(), dist.ReduceOp.SUM, group).log()


def _log_softmax(logits: torch.Tensor, valid: int, group: Any, out: torch.Tensor) -> torch.Tensor:
    """Write to `out` the fp32 log-probabilities over the whole vocabulary of this shard's columns [n, V/tp]."""
    # columns that pad the vocabulary
    logits[:, valid:] = float("-inf")
    torch.log_softmax(logits.float(), dim=1, out=out)
    if group is None:
        return out
    if valid == 0:
        out.fill_(float("-inf"))
    # the shard's own normaliser, recovered from its first column
    ours = logits[:, 0].float() - out[:, 0] if valid else out[:, 0].clone()
    whole = _logsumexp_over(ours, group)
    return out.add_((ours - whole)[:, None]) if valid else out


def _accumulate(
    logit_grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, grads: tuple[torch.Tensor, ...], factor: float
) -> None:
    """Add the gradients of hidden states, weight and bias that follow from the logits' gradient, softmax - one_hot."""
    grads[2].addmv_(logit_grad.t(), logit_grad.new_ones(len(logit_grad)))
    logit_grad = logit_grad.to(weight.dtype)
    _product(logit_grad, weight, factor, out=grads[0])
    if weight.dtype == torch.float32:
        grads[1].addmm_(logit_grad.t(), hidden)
    else:
        grads[1].add_(_product(logit_grad.t(), hidden, factor))


def _product(a: torch.Tensor, b: torch.Tensor, factor: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b x factor, scaled in fp32 while summing and rounded once.

    Rounding before and after scaling would round to one side for factors near a power of two.
    """
    if factor == 1:
        return torch.mm(a, b, out=out)
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=factor, out=out)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    options: LossOptions | None = None,
) -> LossOutput:
    """Return the cross entropy of `hidden @ weight.T + bias` at `labels`. Backward may be called once only.

    Args:
        hidden: [n, H]; n may be 0.
        weight: this rank's rows [V/tp, H] of the vocabulary.
        bias: this rank's part [V/tp].
        labels: ids [n] of the whole vocabulary.
        options: shard of the vocabulary, padding and scale; by default the whole vocabulary and a factor of 1.
    """
    vocab = options or LossOptions()
    vocab = replace(
        vocab,
        valid=min(vocab.valid, weight.shape[0]),
        factor=1.0 if weight.dtype == torch.float32 else vocab.factor,
    )
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = _LinearCrossEntropy.apply
    return LossOutput(*apply(hidden, weight, bias, labels, (vocab, torch.is_grad_enabled())))
