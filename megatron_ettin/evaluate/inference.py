"""Load a checkpoint in one process, in fp32 on the CPU, to evaluate it or to compute its logits for given tokens.

Exports to Hugging Face are checked against these logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_ettin.base.errors import UserError, nearest
from megatron_ettin.config.operations import CheckpointConfig, ParallelConfig
from megatron_ettin.config.schema import Config, PrecisionConfig
from megatron_ettin.config.tables import OBJECTIVES, ROW_OBJECTIVES
from megatron_ettin.evaluate.evaluation import EvalDataset, build_eval_dataset
from megatron_ettin.model.boundaries import ChunkBoundaries
from megatron_ettin.model.packed import PackedRows
from megatron_ettin.parallel.groups import destroy_model_parallel
from megatron_ettin.parallel.process_groups import destroy_process_group
from megatron_ettin.train import resume
from megatron_ettin.train.setup import TrainState, build_single_process


def single_process_config(config: Config) -> Config:
    """Return the configuration for the same model in one process, in fp32 on the CPU."""
    plain = dataclasses.replace(
        config, parallel=ParallelConfig(), precision=PrecisionConfig("fp32"), checkpoint=CheckpointConfig()
    )
    return plain.with_keys({"runtime.device": "cpu"})


@contextlib.contextmanager
def load_for_inference(checkpoint: Path, objective: str | None = None) -> Iterator[TrainState]:
    """Build a checkpoint's whole model in this process, without its weights, and destroy its process groups afterwards.

    Args:
        checkpoint: the checkpoint folder.
        objective: objective that decides whether attention is causal; None takes that of the checkpoint.
    """
    config = single_process_config(resume.checkpoint_config(checkpoint))
    config = config.with_keys({"run.objective": objective or config.run.objective})
    train_state = build_single_process(config, initial_weights=False)
    try:
        yield train_state
    finally:
        destroy_model_parallel()
        destroy_process_group()


@contextlib.contextmanager
def open_evaluation(
    checkpoint: Path, datasets: Mapping[str, str], objective: str | None, seq_len: int | None
) -> Iterator[tuple[TrainState, EvalDataset]]:
    """Load a checkpoint's weights, open the rows to evaluate it on, and destroy its process groups afterwards.

    Args:
        checkpoint: the checkpoint folder.
        datasets: paths of the datasets by name.
        objective: row objective; None takes the checkpoint's, of a hybrid the masked one.
        seq_len: tokens of a row; None takes the length of training.

    Raises:
        UserError: the objective or row length is not possible, or a dataset or the checkpoint cannot be used.
    """
    if objective is None:
        objective = OBJECTIVES[resume.checkpoint_config(checkpoint).run.objective].row_objectives[-1]
    if objective not in ROW_OBJECTIVES:
        hint = nearest(objective, ROW_OBJECTIVES)
        raise UserError(f"--objective: {objective!r} does not exist{hint}; it is one of {', '.join(ROW_OBJECTIVES)}")
    with load_for_inference(checkpoint, objective) as train_state:
        held_out = build_eval_dataset(train_state, datasets, objective, seq_len)
        for batches in held_out.sources.values():
            resume.check_tokenizer(checkpoint, batches.corpus)
        resume.load(train_state, checkpoint, with_optimizer=False)
        yield train_state, held_out


def logits_of(checkpoint: Path, token_lists: list[list[int]], objective: str | None = None) -> list[torch.Tensor]:
    """Return the fp32 logits [n, vocabulary] of each list of n token ids. Each list is a chunk of its own.

    The caller must have checked the checkpoint's checksums, because this function does not.

    Args:
        checkpoint: the checkpoint folder.
        token_lists: token ids; the lists may differ in length.
        objective: as in `load_for_inference`.
    """
    with load_for_inference(checkpoint, objective) as train_state:
        resume.load(train_state, checkpoint, with_optimizer=False, verified=True)
        return compute_logits(train_state.model_chunks[0], token_lists, train_state.platform.device)


def compute_logits(
    model: torch.nn.Module, token_lists: Sequence[Sequence[int]], device: torch.device
) -> list[torch.Tensor]:
    """Return the logits [n, vocabulary] of each list of n token ids. This leaves the model in evaluation mode."""
    model.eval()
    logits = []
    with torch.no_grad():
        for ids in token_lists:
            packed = PackedRows.of(ChunkBoundaries.of([[len(ids)]], len(ids)), device)
            logits.append(model(torch.tensor([[*ids]], device=device), packed))
    return logits
