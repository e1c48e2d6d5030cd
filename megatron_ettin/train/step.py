"""Run an optimizer step: micro-batches through core's pipeline schedule, one all-reduce of totals, one update.

The loss is normalised by the number of predicted tokens of the whole batch (`global`, the default) or, as the original
trainer did, by each micro-batch's own number (`microbatch`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin.batching.batches import Batches, MicroBatch
from megatron_ettin.config.flops import training_flops
from megatron_ettin.config.tables import OBJECTIVES
from megatron_ettin.faults.anomalies import AnomalyDetector
from megatron_ettin.faults.heartbeat import FIGURES, LATE_UPDATE, UPDATE
from megatron_ettin.model.loss import LossOutput
from megatron_ettin.platform.fp8 import preserve_fp8_state
from megatron_ettin.platform.profiler import trace_range
from megatron_ettin.train.graphed_step import GraphedStep
from megatron_ettin.train.progress import STEP_SLOTS, ControlSignal, StepResult, StepTotals
from megatron_ettin.train.setup import TrainState


def train_step(
    train_state: TrainState,
    batches: Batches,
    lr: float,
    detector: AnomalyDetector | None = None,
    signal: ControlSignal = ControlSignal.NONE,
) -> StepResult:
    """Train the step after `train_state.progress` and return its result. Collective.

    The progress stays as it is.

    Args:
        train_state: the model and its optimizer.
        batches: micro-batches of the run.
        lr: learning rate of the step.
        detector: detector that may skip the update because of the loss or gradient norm; None makes every update.
        signal: this rank's signal. STOP counts from any rank, the others from rank 0 only.

    Raises:
        RankError: the data cannot be read.
    """
    began, timer, optimizer = time.perf_counter(), train_state.clock, train_state.optimizer
    assert optimizer is not None
    config, step, tokens_before = train_state.config, train_state.progress.step, train_state.progress.tokens
    profiled = step + 1 in config.profile.step_range
    timer.begin()
    optimizer.zero_grad()
    micro_batches = timer.reading(batches.step(step))
    with trace_range(train_state.platform, f"forward and backward of step {step + 1}", profiled):
        totals = run_micro_batches(train_state, micro_batches, batches.host.count(step), training=True)
    timer.heartbeat.set_phase(UPDATE)
    with trace_range(train_state.platform, "gradients", profiled):
        optimizer.prepare()
    judged_first = detector is not None and detector.skips
    # queue the update first if possible: the next lines wait for the device, which would be idle meanwhile
    if not judged_first:
        with trace_range(train_state.platform, "update", profiled):
            optimizer.update(lr)
    timer.heartbeat.set_phase(FIGURES)
    totals.add("stop", float(signal is ControlSignal.STOP))
    totals.add("signal", float(signal), reduce="rank_zero")
    totals.add("grad_norm", optimizer.norm(), reduce="rank_zero")
    sums = totals.all_reduce(train_state.layout.rank, train_state.platform.device)
    loss = sums["loss"] / max(sums["labels"], 1)
    anomaly = None if detector is None else detector.judge(loss, sums["grad_norm"])
    left_out = judged_first and anomaly is not None and anomaly.leaves_out
    if judged_first and not left_out:
        timer.heartbeat.set_phase(LATE_UPDATE)
        with trace_range(train_state.platform, "update", profiled):
            optimizer.update(lr)
    timer.end()
    tokens, labels, pairs = sums["tokens"], sums["labels"], (sums["global_pairs"], sums["local_pairs"])
    return StepResult(
        step=step + 1,
        tokens=tokens_before + int(tokens),
        loss=loss,
        lr=lr,
        grad_norm=sums["grad_norm"],
        step_tokens=int(tokens),
        labels=int(labels),
        rows=batches.corpus.order_span(*batches.sizes.span(step)),
        seconds=time.perf_counter() - began,
        flops=training_flops(config.model, config.model.vocab_size, tokens, labels, *pairs),
        extra=loss_by_objective(config.run.objective, sums)
        | {name: sums[name] for name in sums if name not in STEP_SLOTS},
        signal=max(ControlSignal(int(sums["signal"])), ControlSignal.STOP if sums["stop"] else ControlSignal.NONE),
        anomaly=anomaly,
        updated=not left_out,
    )


def run_micro_batches(train_state: TrainState, batches: Iterable[MicroBatch], count: int, training: bool) -> StepTotals:
    """Run forward (and, in training, backward) of micro-batches of one shape. Collective.

    Args:
        train_state: the model and its optimizer.
        batches: the micro-batches; core reads one after another.
        count: number of micro-batches, at least one.
        training: whether gradients are computed.

    Returns:
        The totals of this rank. Only the first tensor rank of the last pipeline stage counts losses.
    """
    models = train_state.ddp_model_chunks if training else train_state.model_chunks
    totals, layout = StepTotals(), train_state.layout
    counts_losses = layout.is_last_pipeline_rank and layout.tp_rank == 0

    # micro-batches are made as core asks for them, while the device computes the one before
    def counted() -> Iterator[MicroBatch]:
        for batch in batches:
            # other context-parallel ranks hold slices of the same rows
            if counts_losses and layout.cp_rank == 0:
                totals.add("tokens", batch.tokens)
                totals.add("global_pairs", batch.pairs[0])
                totals.add("local_pairs", batch.pairs[1])
            yield batch

    rest = counted()
    first = next(rest)
    in_order = itertools.chain((first,), rest)
    config = train_state.config
    factor_of = functools.partial(normalising_factor, config.batch.loss_normalization, config.parallel.engine, count)
    graphed = train_state.graphed if training else None
    forward = functools.partial(forward_step, totals, counts_losses, factor_of, graphed)
    run = train_state.optimizer.schedule() if training and train_state.optimizer else get_forward_backward_func()
    with contextlib.nullcontext() if training else preserve_fp8_state(train_state.model_chunks):
        run(
            forward_step_func=forward,
            # each model chunk of a rank reads the step's micro-batches
            data_iterator=list(itertools.tee(in_order, len(models))) if len(models) > 1 else in_order,
            model=list(models) if len(models) > 1 else models[0],
            num_microbatches=count,
            # rows are flattened: core sees one sequence of all their tokens
            seq_length=first.input_ids.numel() * layout.topology.cp,
            micro_batch_size=1,
            forward_only=not training,
        )
    return totals


def normalising_factor(loss_normalization: str, engine: str, micro_batches: int, labels: int) -> float:
    """Return the factor by which core, or DeepSpeed's engine, multiplies a micro-batch's sum of losses before backward.

    Under `global` it is 1: the sum over all ranks is divided by its labels once, in the gradients' buffers.

    Args:
        loss_normalization: `batch.loss_normalization`.
        engine: `parallel.engine`.
        micro_batches: number of micro-batches of this rank in the step.
        labels: number of labels of the micro-batch.
    """
    if loss_normalization == "global":
        return 1.0
    # DeepSpeed's loss scale holds the number of micro-batches already
    return 1 / (max(labels, 1) * (1 if engine == "deepspeed" else micro_batches))


def forward_step(
    totals: StepTotals,
    counts_losses: bool,
    factor_of: Callable[[int], float],
    graphed: GraphedStep | None,
    batches: Iterator[MicroBatch],
    model: Any,
) -> tuple[Any, Any]:
    """Run one micro-batch, add its losses to the totals, and return its output and the loss function for core.

    Bind the first four arguments to get core's forward_step_func.

    Args:
        totals: totals of the step.
        counts_losses: whether this rank counts the losses.
        factor_of: function from a number of labels to the factor by which core later multiplies their losses.
        graphed: replays the micro-batches that fit; None if no graph is used.
        batches: micro-batches; the next one is run.
        model: the model chunk.
    """
    batch = next(batches)
    labels = len(batch.labels)
    if graphed is not None and graphed.fits(batch):
        output = graphed.replay(batch, model)
    else:
        output = model(batch.input_ids, batch.packed, batch.labels, batch.label_positions, factor_of(labels))
    is_loss = isinstance(output, LossOutput)
    add_losses(totals, output.losses if is_loss and counts_losses else None)
    # a stage that is not the last returns hidden states for the next stage
    if not is_loss:
        return output, None
    if counts_losses:
        if not model.training:
            totals.add("correct", output.correct.sum())
        # the model may be inside the wrapper that reduces its gradients
        if getattr(model, "module", model).config.hybrid:
            # labels of causal rows come first
            totals.add("causal_loss", output.losses[: batch.causal_labels].double().sum())
            totals.add("causal_labels", batch.causal_labels)
    return output.total, functools.partial(loss_and_labels, labels)


def add_losses(totals: StepTotals, losses: torch.Tensor | None) -> None:
    """Add the losses of one micro-batch to the totals. A new metric of the losses is added in this function.

    It is called for every micro-batch, replayed or not.

    Args:
        totals: totals of the step.
        losses: losses [n] of the labels; None on a rank that does not count them, which only creates the slots.
    """
    totals.add("loss", None if losses is None else losses.double().sum())
    totals.add("labels", None if losses is None else len(losses))


def loss_and_labels(
    labels: int, total: torch.Tensor, non_loss_data: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (sum of losses, number of labels, nothing to report), as core's loss function does."""
    return total, torch.full((), labels, dtype=torch.int32, device=total.device), {}


def loss_by_objective(name: str, sums: Mapping[str, float]) -> dict[str, Any]:
    """Return, for a hybrid run, the mean loss of each row objective and the number of causal labels."""
    objective = OBJECTIVES[name]
    if not objective.is_hybrid:
        return {}
    causal, masked = objective.row_objectives
    causal_loss, causal_labels = sums["causal_loss"], sums["causal_labels"]
    figures: dict[str, Any] = {f"labels_{causal}": int(causal_labels)}
    if causal_labels:
        figures[f"loss_{causal}"] = causal_loss / causal_labels
    if sums["labels"] > causal_labels:
        figures[f"loss_{masked}"] = (sums["loss"] - causal_loss) / (sums["labels"] - causal_labels)
    return figures
