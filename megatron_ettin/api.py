"""The package for scripts and notebooks: a typed function for each thing that people script.

Importing it costs nothing; a function imports what it needs when it is called. Mistakes raise `UserError` with the line
that a command would print. What is returned are the package's own objects: their documented attributes are part of this
interface, other modules of the package are not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError
from megatron_ettin.config.schema import Config

if TYPE_CHECKING:
    import torch

    from megatron_ettin.batching.batches import Batches
    from megatron_ettin.data.blended_dataset import Row
    from megatron_ettin.data.dataset import Dataset
    from megatron_ettin.evaluate.evaluation import EvalResult
    from megatron_ettin.plan.search import Planned
    from megatron_ettin.report.compare import Comparison
    from megatron_ettin.train.setup import TrainState
    from megatron_ettin.train.step import StepInfo

__all__ = [
    *("Checkpoint", "Model", "UserError", "build_model", "compare", "configure", "evaluate", "from_hf", "iterate_rows"),
    *("load_checkpoint", "load_dataset", "order", "plan", "run_step", "to_hf", "train"),
]

AnyPath = str | PathLike[str]
ROWS_AT_ONCE = 64  # that are looked up


def configure(size: str, objective: str, phase: str, *words: str, site: AnyPath | None = None) -> Config:
    """A run, resolved and checked: the recipe's tables, then a site file, then `group.key=value` words.

    As `ettin train --size SIZE --objective OBJECTIVE --phase PHASE --config SITE WORDS...` has it."""
    from megatron_ettin.config.resolve import parse

    return parse(size, objective, phase, Path(site) if site is not None else None, words)


def load_dataset(path: AnyPath) -> Dataset:
    """A dataset made by `ettin prepare`, memory-mapped. `num_documents`, `num_chunks`, `num_tokens`, `fingerprint`;
    `chunk(i)` are the tokens of a chunk, `document_of(i)` where it comes from, `verify()` reads every byte."""
    from megatron_ettin.data.dataset import open_dataset

    return open_dataset(Path(path))


def iterate_rows(config: Config, first: int = 0, count: int | None = None) -> Iterator[Row]:
    """Rows of a run in its order, from position `first` on: `count` of them, or for ever; a `data.order` has an end.

    Of each row: `tokens`, `lengths` of its chunks, `source`, `chunks`, `position`. Needs `data.mixture`, no model."""
    from megatron_ettin.data.blended_dataset import open_run_dataset

    corpus = open_run_dataset(config)
    ends = [end for end in (corpus.end, None if count is None else first + count) if end is not None]
    while not ends or first < min(ends):
        last = min([first + ROWS_AT_ONCE, *ends])
        yield from corpus.rows(corpus.place_of(range(first, last)))
        first = last


@dataclass
class Model:
    """A model of this process (or this rank's part of it, under torchrun or srun), with its optimizer.

    Made by `build_model`. `step` and `tokens` are how far it has been trained."""

    config: Config
    train_state: TrainState
    step: int = 0
    tokens: int = 0

    @property
    def module(self) -> torch.nn.Module:
        """The first chunk of the model: all of it, unless there are pipeline stages."""
        return self.train_state.model_chunks[0]

    @functools.cached_property
    def batches(self) -> Batches:
        """What the steps of the run train on."""
        from megatron_ettin.batching.batches import Batches
        from megatron_ettin.data.blended_dataset import open_run_dataset

        train_state = self.train_state
        return Batches.of(self.config, open_run_dataset(self.config), train_state.layout, train_state.platform.device)

    def logits(self, token_lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits [n, vocabulary] of each list of n tokens, each a document of its own. Of one process only."""
        import torch

        from megatron_ettin.model.packed import pack_rows

        if self.train_state.layout.topology.world > 1:
            raise UserError("logits: are of a model in one process")
        model, device = self.module.eval(), self.train_state.platform.device
        with torch.no_grad():
            found = [
                model(torch.tensor([[*ids]], device=device), pack_rows([[len(ids)]], len(ids), device))
                for ids in token_lists
            ]
        model.train()
        return found


@contextlib.contextmanager
def build_model(config: Config, checkpoint: AnyPath | None = None) -> Iterator[Model]:
    """The model of a run with its initial weights, or those of a checkpoint, a run or a Hugging Face folder.

    One at a time: core's process groups are the process's own, and are gone after the `with`. Collective."""
    from megatron_ettin.convert.from_hf import as_checkpoint
    from megatron_ettin.parallel.env import read_distributed_env
    from megatron_ettin.parallel.groups import destroy_model_parallel
    from megatron_ettin.parallel.process_groups import destroy_process_group, init_process_group
    from megatron_ettin.platform import detect
    from megatron_ettin.train import resume
    from megatron_ettin.train.setup import setup_training

    place = read_distributed_env()
    platform = detect(config.run.device, place.local_rank)
    init_process_group(place, platform)
    train_state = None
    try:
        train_state = setup_training(config, platform, place.world, initial_weights=checkpoint is None)
        if checkpoint is not None:
            with as_checkpoint(Path(checkpoint)) as found:
                resume.load(train_state, found, with_optimizer=False)
        yield Model(config, train_state)
    finally:
        if train_state is not None:
            train_state.close()
        destroy_model_parallel()
        destroy_process_group()


def run_step(model: Model, lr: float | None = None) -> StepInfo:
    """The run's next step: its rows, forward and backward, one update, at the schedule's rate or `lr`. Collective.

    Returns `loss`, `grad_norm`, `lr`, `labels`, `rows`, `seconds` and more, equal on every rank."""
    from megatron_ettin.optim.schedule import lr_fraction
    from megatron_ettin.train.step import train_step

    config = model.config
    if lr is None:
        lr = config.optim.lr * lr_fraction(model.tokens, config.schedule, config.run.tokens)
    info = train_step(model.train_state, model.batches, model.step, model.tokens, lr, stop=False)
    model.step, model.tokens = info.step, info.tokens
    return info


def train(config: Config, run_dir: AnyPath, init_from: AnyPath | None = None) -> bool:
    """What `ettin train` does: a whole run with metrics and checkpoints, or the rest of one.

    True where it was asked to stop before its end."""
    from megatron_ettin.train.trainer import TrainArgs, run_training

    return run_training(config, TrainArgs(Path(run_dir), Path(init_from) if init_from is not None else None))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, whole whatever layout wrote them, and what it was trained as."""

    path: Path
    config: Config
    step: int
    tokens: int

    def names(self, optimizer: bool = False) -> list[str]:
        """Of the model's tensors; with `optimizer` of its state too."""
        return [name for name in self._reader.keys() if optimizer or not name.startswith("optimizer.")]  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self._reader.read(name)

    @functools.cached_property
    def _reader(self) -> Any:
        from megatron_ettin.checkpoint.reader import CheckpointReader

        return CheckpointReader(self.path)


def load_checkpoint(path: AnyPath, verify: bool = True) -> Checkpoint:
    """A checkpoint folder, or the latest of a run; with `verify` every file's sha256 is checked first."""
    from megatron_ettin.checkpoint import directory
    from megatron_ettin.train.resume import checkpoint_config

    found = directory.resolve(Path(path))
    if verify:
        directory.verify(found)
    progress = directory.read_progress(found)
    return Checkpoint(found, checkpoint_config(found), int(progress["step"]), int(progress["tokens"]))


def to_hf(
    checkpoint: AnyPath, out: AnyPath, dtype: str = "float32", verify: bool = True, objective: str | None = None
) -> dict[str, Any]:
    """A checkpoint, or a run's latest, as a folder for `transformers`. What was written, `parity` where verified."""
    from megatron_ettin.convert.to_hf import to_hf as export
    from megatron_ettin.evaluate.inference import logits_of

    logits = logits_of if verify else None
    return export(Path(checkpoint), Path(out), dtype, verify, our_logits=logits, objective=objective)


def from_hf(folder: AnyPath, out: AnyPath, objective: str | None = None) -> dict[str, Any]:
    """A folder of `transformers` as a checkpoint of weights. What was read, and what had to be assumed."""
    from megatron_ettin.convert.from_hf import from_hf as imported

    return imported(Path(folder), Path(out), objective=objective)


def evaluate(
    checkpoint: AnyPath,
    data: AnyPath | Mapping[str, AnyPath],
    rows: int | None = None,
    objective: str | None = None,
    seq_len: int | None = None,
) -> EvalResult:
    """Loss of a checkpoint, a run or a Hugging Face folder on datasets, in all and by source, in fp32 on the CPU.

    `loss`, `accuracy`, `perplexity`, `labels`, `rows`, `sources`. `data`: a dataset, or names and datasets."""
    from megatron_ettin.config.tables import OBJECTIVES
    from megatron_ettin.convert.from_hf import as_checkpoint
    from megatron_ettin.evaluate import evaluation as evaluation
    from megatron_ettin.evaluate.inference import load_for_inference
    from megatron_ettin.train import resume

    named = data if isinstance(data, Mapping) else {Path(data).name: data}
    with as_checkpoint(Path(checkpoint)) as found:
        kind = objective or OBJECTIVES[resume.checkpoint_config(found).run.objective].row_objectives[-1]
        with load_for_inference(found, kind) as train_state:
            sets = {name: str(path) for name, path in named.items()}
            held_out = evaluation.build_eval_dataset(train_state, sets, kind, seq_len)
            for batches in held_out.sources.values():
                resume.check_tokenizer(found, batches.corpus)
            resume.load(train_state, found, with_optimizer=False)
            return evaluation.evaluate(train_state, held_out, rows)


def order(run: AnyPath, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Which documents and spans steps `first` to `last` of a run used or will use: an object a chunk."""
    from megatron_ettin.runs import order_export as orders

    config, corpus = orders.open_run(Path(run))
    orders.check_same_order(Path(run), corpus)
    return orders.spans(config, corpus, range(first - 1, last))


def compare(*runs: AnyPath) -> Comparison:
    """Whether runs are a pair: `verdict`, and `checks` (or those `failed`), each with `name`, `passed` and `detail`."""
    from megatron_ettin.report.compare import compare as compared

    return compared([Path(run) for run in runs])


def plan(config: Config, gpus: int, gpu: str = "h100", chunk_tokens: float | None = None) -> list[Planned]:
    """The layouts that `gpus` devices can have, fastest first, as predicted.

    Of each: its `config`, `dp`, `tokens_per_second_per_gpu`, `mfu`, `time.total` of a step, `memory.total_bytes`."""
    from megatron_ettin.plan.hardware import find_gpu
    from megatron_ettin.plan.search import search
    from megatron_ettin.plan.step_time import PUBLISHED, usual_chunk_tokens

    part = find_gpu(gpu, None)
    tokens = min(chunk_tokens or usual_chunk_tokens(config), float(config.data.seq_len))
    return search(config, gpus, part, PUBLISHED, tokens, part.gpus_per_node)[0]
