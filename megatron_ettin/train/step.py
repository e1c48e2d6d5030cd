"""One optimizer step: micro-batches through core's pipeline schedule, one sum over all ranks, one update.

The loss is normalised by the number of predicted tokens of the whole batch (`global`, the default) or, as the original
trainer did, by each micro-batch's own number (`microbatch`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ettin.batching.batches import Batches, MicroBatch
from megatron_ettin.batching.loader import LoadedBatch
from megatron_ettin.config.flops import training_flops
from megatron_ettin.config.schema import Config
from megatron_ettin.config.tables import OBJECTIVES
from megatron_ettin.faults.anomalies import Anomaly, AnomalyDetector
from megatron_ettin.model.loss import LossOutput
from megatron_ettin.parallel.collectives import all_reduce_sum
from megatron_ettin.platform.fp8 import preserve_fp8_state
from megatron_ettin.platform.profiler import trace_range
from megatron_ettin.train.setup import TrainState


@dataclass(frozen=True)
class StepInfo:
    """What a step did, equal on every rank. `step` counts from 1 once done."""

    step: int
    tokens: int  # of the run so far
    loss: float  # mean over predicted tokens
    lr: float
    grad_norm: float
    step_tokens: int
    labels: int
    rows: tuple[int, int]
    seconds: float
    flops: float
    stop_requested: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    asked: float = 0.0  # by rank 0, with its sums
    bad: Anomaly | None = None  # what is wrong with loss or gradient norm
    updated: bool = True


@dataclass
class Totals:
    """Sums over micro-batches of what this rank is the one to count."""

    loss: float = 0.0
    labels: int = 0
    correct: int = 0
    causal_loss: float = 0.0  # of the causal rows of a hybrid objective
    causal_labels: int = 0
    tokens: int = 0
    global_pairs: int = 0
    local_pairs: int = 0

    def count(self, batch: MicroBatch) -> None:
        self.tokens += batch.tokens
        self.global_pairs += batch.pairs[0]
        self.local_pairs += batch.pairs[1]

    def __iadd__(self, other: Totals) -> Totals:
        for name, value in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass
class Unread:
    """Sums over micro-batches whose losses the device may still be computing."""

    totals: Totals
    reports: list[dict[str, torch.Tensor]]  # of each micro-batch; none where this rank is not the one to count

    def read(self) -> Totals:
        """Wait for the device, once."""
        if self.reports:
            names = list(self.reports[0])
            sums = [torch.stack([report[name] for report in self.reports]).sum().double() for name in names]
            for name, value in zip(names, torch.stack(sums).tolist(), strict=True):
                setattr(self.totals, name, value if name.endswith("loss") else int(value))
        return self.totals


def run_micro_batches(train_state: TrainState, batches: Iterable[MicroBatch], count: int, training: bool) -> Unread:
    """Forward (and backward) of `count` micro-batches of one shape. The last stage's first tensor rank counts, others
    have zeros."""
    models = train_state.ddp_model_chunks if training else train_state.model_chunks
    totals, layout = Totals(), train_state.layout
    counting = layout.is_last_pipeline_rank and layout.tp_rank == 0

    def counted() -> Iterator[MicroBatch]:  # made as they are asked for: labelling overlaps with what the device does
        for batch in batches:
            if counting and layout.cp_rank == 0:  # its slices are of rows that others have parts of
                totals.count(batch)
            yield batch

    tokens, given = tokens_of_first(counted())
    forward = functools.partial(forward_step, functools.partial(normalising_factor, train_state.config, count))
    run = train_state.optimizer.schedule() if training and train_state.optimizer else get_forward_backward_func()
    graphed = train_state.graphed if training else None
    with contextlib.nullcontext() if training else preserve_fp8_state(train_state.model_chunks):
        outputs = run(
            forward_step_func=forward if graphed is None else functools.partial(graphed, forward),
            # model chunks of one rank each read the step's micro-batches
            data_iterator=list(itertools.tee(given, len(models))) if len(models) > 1 else given,
            model=list(models) if len(models) > 1 else models[0],
            num_microbatches=count,
            # rows are flattened: core sees one sequence of all their tokens
            seq_length=tokens * layout.topology.cp,
            micro_batch_size=1,
            forward_only=not training,
        )
    return Unread(totals, outputs if counting else [])


def tokens_of_first(batches: Iterator[MicroBatch]) -> tuple[int, Iterator[MicroBatch]]:
    """Return the tokens that this rank has of the first micro-batch, and all of them again."""
    first = next(batches)
    return first.input_ids.numel(), itertools.chain((first,), batches)


def normalising_factor(config: Config, micro_batches: int, labels: int) -> float:
    """Return by what core, or DeepSpeed's engine, multiplies the sum of losses of a micro-batch before backward.

    Under `global` that is 1: the sum over all ranks is divided by its labels once, in the gradients' buffers."""
    if config.batch.loss_normalization == "global":
        return 1.0
    # of DeepSpeed the number of micro-batches is in its loss scale
    return 1 / (max(labels, 1) * (1 if config.parallel.engine == "deepspeed" else micro_batches))


def forward_step(factor_of: Callable[[int], float], batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
    """Core's forward_step_func: run one micro-batch, return its output and how to make a loss of it. `factor_of`: by
    what the loss of so many labels will be multiplied."""
    batch = next(batches)
    output = model(batch.input_ids, batch.packed, batch.labels, batch.label_positions, factor_of(len(batch.labels)))
    if not isinstance(output, LossOutput):  # hidden states for the next stage
        return output, None
    total, losses, correct = output
    chunk = getattr(model, "module", model)  # inside what reduces its gradients
    return total, functools.partial(
        sum_of_losses, losses, correct, batch.causal_labels if chunk.config.hybrid else None
    )


def sum_of_losses(
    losses: torch.Tensor,
    correct: torch.Tensor,
    causal_labels: int | None,
    total: torch.Tensor,
    non_loss_data: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Core's loss function: (sum, number of predicted tokens, what to report). losses [n]; the first `causal_labels`
    of them are of causal rows, where a model has both kinds."""
    count = torch.full((), len(losses), dtype=torch.int32, device=losses.device)
    report = {"loss": losses.double().sum(), "labels": count, "correct": correct.sum()}
    if causal_labels is not None:
        report["causal_loss"] = losses[:causal_labels].double().sum()
        report["causal_labels"] = torch.full_like(count, causal_labels)
    return total, count, report


def train_step(
    train_state: TrainState,
    batches: Batches,
    step: int,
    tokens_before: int,
    lr: float,
    stop: bool,
    loaded: Iterable[LoadedBatch] | None = None,
    guard: AnomalyDetector | None = None,
    asked: float = 0.0,
) -> StepInfo:
    """Train on the rows of `step` (from 0), which are made here unless a loader has them. `stop`: this rank was asked
    to stop; one rank's wish is everyone's. `asked`: what rank 0 asks of all. Where `guard` objects to the figures, the
    update is left out."""
    began, clock, optimizer = time.perf_counter(), train_state.clock, train_state.optimizer
    assert optimizer is not None
    clock.begin()
    optimizer.zero_grad()
    count = batches.micro_batch_count(step)
    read = clock.reading(batches.step(step, loaded))
    profiled = step + 1 in train_state.config.profile.step_range
    with trace_range(train_state.platform, f"forward and backward of step {step + 1}", profiled):
        unread = run_micro_batches(train_state, read, count, training=True)
    clock.update()
    with trace_range(train_state.platform, "gradients", profiled):
        optimizer.prepare()
    judged_first = guard is not None and guard.skips
    if not judged_first:  # what follows waits for the device, which would stand idle until the update is queued
        with trace_range(train_state.platform, "update", profiled):
            optimizer.update(lr)
    clock.last_sum()
    sums = all_reduce_totals(train_state, unread.read(), optimizer.norm(), stop, asked)
    loss = sums.loss / max(sums.labels, 1)
    bad = None if guard is None else guard.judge(loss, sums.grad_norm)
    left_out = judged_first and bad is not None and bad.leaves_out
    if judged_first and not left_out:
        clock.late_update()
        with trace_range(train_state.platform, "update", profiled):
            optimizer.update(lr)
    clock.end()
    model = train_state.config.model
    return StepInfo(
        step=step + 1,
        tokens=tokens_before + int(sums.tokens),
        loss=loss,
        lr=lr,
        grad_norm=sums.grad_norm,
        step_tokens=int(sums.tokens),
        labels=int(sums.labels),
        rows=batches.corpus.span_of(*batches.sizes.span(step)),
        seconds=time.perf_counter() - began,
        flops=training_flops(model, model.vocab_size, sums.tokens, sums.labels, sums.global_pairs, sums.local_pairs),
        stop_requested=sums.stops > 0,
        extra=loss_by_objective(train_state.config, sums.loss, sums.labels, sums.causal_loss, sums.causal_labels),
        asked=sums.asked,
        bad=bad,
        updated=not left_out,
    )


class Sums(NamedTuple):
    """Of a step over all ranks, the same on each; `grad_norm` and `asked` are rank 0's."""

    loss: float
    labels: float
    tokens: float
    global_pairs: float
    local_pairs: float
    causal_loss: float
    causal_labels: float
    stops: float
    asked: float
    grad_norm: float


def all_reduce_totals(train_state: TrainState, totals: Totals, norm: float, stop: bool, asked: float) -> Sums:
    """Collective. Of the norm one rank's goes to all: what follows must be the same everywhere, to the last bit;
    where anyone's is no number, the sum is none."""
    norm = norm if train_state.layout.rank == 0 or not math.isfinite(norm) else 0.0
    figures = [totals.loss, totals.labels, totals.tokens, totals.global_pairs, totals.local_pairs]
    parts = [totals.causal_loss, totals.causal_labels, float(stop), asked, norm]
    return Sums(*all_reduce_sum([*figures, *parts], train_state.platform.device))


def loss_by_objective(
    config: Config, loss: float, labels: float, causal_loss: float, causal_labels: float
) -> dict[str, Any]:
    """Of a hybrid run: the mean loss of the rows of each kind, and how many predicted tokens are of the causal ones."""
    if not OBJECTIVES[config.run.objective].is_hybrid:
        return {}
    causal, masked = OBJECTIVES[config.run.objective].row_objectives
    found: dict[str, Any] = {f"labels_{causal}": int(causal_labels)}
    if causal_labels:
        found[f"loss_{causal}"] = causal_loss / causal_labels
    if labels > causal_labels:
        found[f"loss_{masked}"] = (loss - causal_loss) / (labels - causal_labels)
    return found
