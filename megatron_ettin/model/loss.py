"""Cross entropy of a linear output layer over a vocabulary split by tensor parallelism, in chunks of rows.

The fp32 logits of a whole micro-batch never exist: each chunk's logits become its loss and, at once, its gradients
with respect to hidden states, weight and bias (three matrix products a chunk, as the plain computation has, and none
repeated in backward). The price is that the loss must be a sum scaled by one number afterwards, which training's is.
The vocabulary-parallel softmax is that of Megatron-LM (arXiv 1909.08053): maxima and sums are all-reduced."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_ettin.platform.compile import compile_enabled, maybe_compile

CHUNK_LOGITS_BYTES = 64 * 2**20  # fp32 logits alive at once; large enough for efficient matrix products
DEVICE_CHUNK_ROWS = 4_096  # what fills a GPU; two bf16 tensors of 0.4 GB at the recipe's vocabulary


class LossOutput(NamedTuple):
    """Result of the last pipeline stage for a micro-batch with n labels."""

    total: torch.Tensor
    """Sum of the losses, fp32 scalar; the only differentiable one."""
    losses: torch.Tensor
    """Loss of each label in flat order, fp32 [n]."""
    correct: torch.Tensor
    """Whether each label was the most likely token, bool [n]; False in passes that make gradients."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor,
        first: int, valid: int, group: Any, wants: bool, padded: bool, factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
        grads = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=torch.float32),
            torch.zeros_like(bias, dtype=torch.float32),
        )
        rows = max(64, CHUNK_LOGITS_BYTES // (4 * weight.shape[0]))
        if wants and compile_enabled():
            rows = rows if hidden.device.type == "cpu" else DEVICE_CHUNK_ROWS
            for start in range(0, len(labels), rows):
                part = slice(start, start + rows)
                losses[part] = _fused_chunk(
                    hidden[part], weight, bias, labels[part], first, valid, group, grads, part, factor
                )
            return _finish(ctx, losses, correct, grads, weight, bias, group, factor)
        # the same memory for every chunk: on the CPU the page faults of fresh tensors cost as much as the products
        logits = hidden.new_empty(min(rows, len(labels)), weight.shape[0])
        log_softmax = torch.empty_like(logits, dtype=torch.float32)
        for start in range(0, len(labels), rows):
            part = slice(start, min(start + rows, len(labels)))
            n = part.stop - start
            torch.mm(hidden[part], weight.t(), out=logits[:n]).add_(bias)
            found = _log_softmax(logits[:n], valid, group, out=log_softmax[:n])
            column = (labels[part] - first).clamp(0, weight.shape[0] - 1)[:, None]
            here = (labels[part] >= first) & (labels[part] < first + weight.shape[0])
            target = torch.where(here, found.gather(1, column).squeeze(1), 0.0)
            losses[part] = -_reduced(target, dist.ReduceOp.SUM, group)
            if wants:
                softmax = found.exp_()
                if padded:
                    softmax.mul_((labels[part] >= 0)[:, None])
                _accumulate(softmax, here, column, hidden[part], weight, grads, part, factor)
            else:  # another pass over the logits, for evaluation only
                correct[part] = -losses[part] >= _reduced(found.amax(dim=1), dist.ReduceOp.MAX, group)
        return _finish(ctx, losses, correct, grads if wants else None, weight, bias, group, factor)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        left = upstream[0] / ctx.factor
        return (*(grad.mul_(left.to(grad.dtype)) for grad in ctx.saved_tensors), *[None] * 7)


def _finish(
    ctx: Any, losses: torch.Tensor, correct: torch.Tensor, grads: tuple[torch.Tensor, ...] | None,
    weight: torch.Tensor, bias: torch.Tensor, group: Any, factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Keep what backward scales, and what `linear_cross_entropy` returns."""
    ctx.factor = factor
    if grads is not None:
        _reduced(grads[0], dist.ReduceOp.SUM, group)
        if factor != 1:
            grads[2].mul_(factor)
        ctx.save_for_backward(grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype))
    ctx.mark_non_differentiable(losses, correct)
    return losses.sum(), losses, correct


def _fused_chunk(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, first: int, valid: int,
    group: Any, grads: tuple[torch.Tensor, ...], part: slice, factor: float,
) -> torch.Tensor:  # fmt: skip
    """Losses of some rows; their gradients are added to `grads`. Logits are read twice and never widened in memory."""
    logits = torch.mm(hidden, weight.t())
    normaliser, target = shard_statistics(logits, bias, labels, first, valid)
    if group is not None:
        top = _reduced(normaliser.clone(), dist.ReduceOp.MAX, group)
        normaliser = top + _reduced((normaliser - top).exp(), dist.ReduceOp.SUM, group).log()
        _reduced(target, dist.ReduceOp.SUM, group)
    logit_grad, bias_grad = logit_gradient(logits, bias, labels, normaliser, first, valid)
    grads[2].add_(bias_grad)
    _product(logit_grad, weight, factor, out=grads[0][part])
    grads[1].add_(_product(logit_grad.t(), hidden, factor))
    return torch.where(labels >= 0, normaliser - target, 0.0)


def _real(logits: torch.Tensor, bias: torch.Tensor, valid: int) -> torch.Tensor:
    """fp32 logits with bias; columns that only pad the vocabulary are -inf."""
    values = logits.float() + bias.float()
    if valid == logits.shape[1]:
        return values
    return torch.where(torch.arange(logits.shape[1], device=logits.device) < valid, values, float("-inf"))


@maybe_compile
def shard_statistics(
    logits: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, first: int, valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, fp32: log-sum-exp over this shard, and the label's logit (0 where another shard has it)."""
    values, column = _real(logits, bias, valid), labels - first
    here = (column >= 0) & (column < logits.shape[1])
    found = values.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.logsumexp(values, dim=1), torch.where(here, found, 0.0)


@maybe_compile
def logit_gradient(
    logits: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, normaliser: torch.Tensor, first: int, valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax - one_hot in the logits' type, and its sum over the rows in fp32."""
    softmax = (_real(logits, bias, valid) - normaliser[:, None]).exp()
    one_hot = torch.arange(logits.shape[1], device=logits.device)[None] == (labels - first)[:, None]
    gradient = torch.where((labels >= 0)[:, None], softmax - one_hot.to(softmax.dtype), 0.0)
    return gradient.to(logits.dtype), gradient.sum(dim=0)


def _reduced(values: torch.Tensor, operation: Any, group: Any) -> torch.Tensor:
    """`values` reduced in place over the vocabulary's shards."""
    if group is not None:
        dist.all_reduce(values, op=operation, group=group)
    return values


def _log_softmax(logits: torch.Tensor, valid: int, group: Any, out: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of this shard's columns [n, V/tp] over the whole vocabulary, fp32, in `out`."""
    logits[:, valid:] = float("-inf")  # columns that only pad the vocabulary
    torch.log_softmax(logits.float(), dim=1, out=out)
    if group is None:
        return out
    if valid == 0:
        out.fill_(float("-inf"))
    # what the shard normalised by, found back from its first column
    ours = logits[:, 0].float() - out[:, 0] if valid else out[:, 0].clone()
    top = _reduced(ours.clone(), dist.ReduceOp.MAX, group)
    whole = top + _reduced((ours - top).exp(), dist.ReduceOp.SUM, group).log()
    return out.add_((ours - whole)[:, None]) if valid else out


def _accumulate(
    softmax: torch.Tensor, here: torch.Tensor, column: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], part: slice, factor: float,
) -> None:  # fmt: skip
    """softmax - one_hot is the gradient of the logits; pass it on to hidden, weight and bias."""
    softmax.scatter_add_(1, column, -here.to(softmax.dtype)[:, None])
    grads[2].addmv_(softmax.t(), softmax.new_ones(len(softmax)))
    logit_grad = softmax.to(weight.dtype)
    _product(logit_grad, weight, factor, out=grads[0][part])
    if weight.dtype == torch.float32:
        grads[1].addmm_(logit_grad.t(), hidden)
    else:
        grads[1].add_(_product(logit_grad.t(), hidden, factor))


def _product(a: torch.Tensor, b: torch.Tensor, factor: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b x factor, scaled as it is summed, in fp32, and rounded once: what is rounded before and after is rounded to
    one side by factors near a power of two."""
    if factor == 1:
        return torch.mm(a, b, out=out)
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=factor, out=out)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor,
    first: int = 0, valid: int | None = None, group: Any = None, padded: bool = False, factor: float = 1.0,
) -> LossOutput:  # fmt: skip
    """Sum (differentiable) and values (not) of the cross entropy of `hidden @ weight.T + bias` at `labels`, and, where
    no gradient is asked for, whether each label was the likeliest (else False).

    hidden [n, H]; weight [V/tp, H] and bias [V/tp] are this rank's rows, beginning at row `first` of the vocabulary,
    of which `valid` are real; labels [n] are whole-vocabulary ids; `group` is the tensor-parallel group or None.
    `padded`: some labels are negative, whose losses and gradients are zero. `factor`: by what the caller will multiply
    the sum. Gradients in 16 bits are multiplied by it before they are rounded: what is left for backward is then 1,
    while a factor rounded to bf16, up to 0.4 % off, would scale all gradients of a micro-batch alike.
    Returns fp32 (), fp32 [n], bool [n]. n may be 0. The gradient scales both: call backward once."""
    valid = weight.shape[0] if valid is None else valid
    factor = 1.0 if weight.dtype == torch.float32 else factor
    wants_gradients = torch.is_grad_enabled()
    return LossOutput(
        *_LinearCrossEntropy.apply(hidden, weight, bias, labels, first, valid, group, wants_gradients, padded, factor)
    )
