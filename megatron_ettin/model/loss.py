"""Cross entropy of a linear output layer over a vocabulary split by tensor parallelism, in chunks of rows.

The fp32 logits of a whole micro-batch never exist: each chunk's logits become its loss and, at once, its gradients
with respect to hidden states, weight and bias (three matrix products a chunk, as the plain computation has, and none
repeated in backward). The price is that the loss must be a sum scaled by one number afterwards, which training's is.
The vocabulary-parallel softmax is that of Megatron-LM (arXiv 1909.08053): maxima and sums are all-reduced."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

CHUNK_LOGITS_BYTES = 64 * 2**20  # fp32 logits alive at once; large enough for efficient matrix products


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor,
        first: int, valid: int, group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        wants = any(ctx.needs_input_grad[:3])
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        grads = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=torch.float32),
            torch.zeros_like(bias, dtype=torch.float32),
        )
        rows = max(64, CHUNK_LOGITS_BYTES // (4 * weight.shape[0]))
        # one buffer for every chunk: on the CPU the page faults of fresh ones cost as much as the matrix products
        buffer = hidden.new_empty(min(rows, len(labels)), weight.shape[0])
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            softmax, here = _chunk_loss(
                hidden[part], weight, bias, labels[part], first, valid, group, losses[part], correct[part], buffer
            )
            if wants:
                _accumulate(softmax, here, labels[part] - first, hidden[part], weight, grads, part)
        if wants:
            if group is not None:
                dist.all_reduce(grads[0], group=group)
            ctx.save_for_backward(grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype))
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        return (*(grad.mul_(upstream[0].to(grad.dtype)) for grad in ctx.saved_tensors), None, None, None, None)


def _chunk_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor,
    first: int, valid: int, group: Any, losses: torch.Tensor, correct: torch.Tensor, buffer: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fill `losses` [n] and `correct` [n]; return softmax [n, V/tp] and which labels fall into this shard [n]."""
    logits = torch.mm(hidden, weight.t(), out=buffer[: len(labels)]).float()
    logits += bias
    if valid < logits.shape[1]:
        logits[:, valid:] = float("-inf")  # columns that only pad the vocabulary
    top = logits.amax(dim=1)
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    logits -= top[:, None]
    here = (labels >= first) & (labels < first + logits.shape[1])
    target = logits.gather(1, (labels - first).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    target = torch.where(here, target, 0.0)
    softmax = logits.exp_()
    total = softmax.sum(dim=1)
    if group is not None:
        both = torch.stack([target, total])
        dist.all_reduce(both, group=group)
        target, total = both[0], both[1]
    torch.sub(total.log(), target, out=losses)
    torch.eq(target, 0.0, out=correct)  # the label's logit is the largest, which was subtracted
    return softmax.div_(total[:, None]), here


def _accumulate(
    softmax: torch.Tensor, here: torch.Tensor, column: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], part: slice,
) -> None:  # fmt: skip
    """softmax - one_hot is the gradient of the logits; pass it on to hidden, weight and bias."""
    softmax.scatter_add_(1, column.clamp(0, softmax.shape[1] - 1)[:, None], -here.to(softmax.dtype)[:, None])
    grads[2].addmv_(softmax.t(), softmax.new_ones(len(softmax)))
    logit_grad = softmax.to(weight.dtype)
    torch.mm(logit_grad, weight, out=grads[0][part])
    if weight.dtype == torch.float32:
        grads[1].addmm_(logit_grad.t(), hidden)
    else:
        grads[1].add_(torch.mm(logit_grad.t(), hidden))


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor,
    first: int = 0, valid: int | None = None, group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Sum (differentiable) and values (not) of the cross entropy of `hidden @ weight.T + bias` at `labels`, and
    whether each label was the likeliest.

    hidden [n, H]; weight [V/tp, H] and bias [V/tp] are this rank's rows, beginning at row `first` of the vocabulary,
    of which `valid` are real; labels [n] are whole-vocabulary ids; `group` is the tensor-parallel group or None.
    Returns fp32 (), fp32 [n], bool [n]. n may be 0. The gradient scales both: call backward once."""
    valid = weight.shape[0] if valid is None else valid
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, first, valid, group)
