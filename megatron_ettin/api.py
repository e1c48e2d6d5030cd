"""Use the package from scripts and notebooks through typed functions.

Importing this module is cheap; a function imports what it needs when it is called. Mistakes raise `UserError` with one
line, which may name the command's option for an argument. Functions return the package's own objects: their documented
attributes are part of this interface, other modules of the package are not. "Collective" functions are called by every
rank at once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin.base.errors import UserError, warn_renamed
from megatron_ettin.config.schema import Config
from megatron_ettin.train.interactive import Model, build_model, run_step

if TYPE_CHECKING:
    import torch

    from megatron_ettin.data.blended_dataset import Row
    from megatron_ettin.data.dataset import Dataset
    from megatron_ettin.evaluate.evaluation import EvalResult
    from megatron_ettin.plan.search import Planned
    from megatron_ettin.report.compare import Comparison

__all__ = ["Checkpoint", "Model", "UserError", "build_model", "compare", "configure", "evaluate", "from_hf"]
__all__ += ["iterate_rows", "load_checkpoint", "load_dataset", "order", "plan", "run_step", "to_hf", "train"]

AnyPath = str | PathLike[str]
# number of rows that `iterate_rows` looks up at a time
ROWS_AT_ONCE = 64
# name of a former version -> where the object is now
_RENAMED = {
    "Evaluated": ("megatron_ettin.evaluate.evaluation", "EvalResult"),
    "Measured": ("megatron_ettin.evaluate.evaluation", "EvalMetrics"),
    "StepInfo": ("megatron_ettin.train.progress", "StepResult"),
}


def __getattr__(name: str) -> Any:
    """Return the object that had this name in a former version, and issue a DeprecationWarning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, new = _RENAMED[name]
    warn_renamed(name, f"{module}.{new}")
    return getattr(importlib.import_module(module), new)


def configure(
    size: str,
    objective: str,
    phase: str,
    *overrides: str,
    user_config: AnyPath | None = None,
    site: AnyPath | None = None,
) -> Config:
    """Resolve and check a run's configuration: the recipe's tables, then a user config, then overrides.

    The same as `ettin train --size SIZE --objective OBJECTIVE --phase PHASE --config YAML OVERRIDES...`.

    Args:
        size: `17m`, `32m`, `68m`, `150m`, `400m` or `1b`.
        objective: `mlm` (encoder), `clm` (decoder), `mntp`, `hybrid` or `hybrid_mntp`.
        phase: `pretrain`, `extend`, `decay` or `cross`.
        overrides: `group.key=value`, such as `"parallel.tp=2"`; the keys are listed in docs/config.md.
        user_config: a YAML file of groups of keys.
        site: former name of `user_config` (deprecated).

    Returns:
        The frozen configuration, complete and checked.

    Raises:
        UserError: for an unknown name or key, or values that do not fit together.
    """
    from megatron_ettin.config.resolve import parse

    if site is not None:
        warn_renamed("configure(site=...)", "configure(user_config=...)")
        user_config = site
    return parse(size, objective, phase, Path(user_config) if user_config is not None else None, overrides)


def load_dataset(path: AnyPath) -> Dataset:
    """Open a dataset made by `ettin prepare`. It is memory-mapped: opening it reads only the manifest.

    Args:
        path: the dataset's folder.

    Returns:
        The dataset. `num_documents`, `num_chunks` and `num_tokens` are counts; `fingerprint` is a sha256 of the
        content; `chunk(i)` returns the token ids [n] of a chunk, `document_of(i)` its source and document, and
        `verify()` checks every byte.

    Raises:
        UserError: the folder has no dataset, or a damaged one.
    """
    from megatron_ettin.data.dataset import open_dataset

    return open_dataset(Path(path))


def iterate_rows(config: Config, first: int = 0, count: int | None = None) -> Iterator[Row]:
    """Yield the rows of a run in its order. This needs `data.mixture` and no model.

    Args:
        config: the run.
        first: index of the first row, from 0.
        count: number of rows; None yields rows without end, or up to the end of a recorded order (`data.order`).

    Yields:
        Rows. `tokens` [n] has at most `data.seq_len` token ids; `lengths` has the number of tokens of each chunk.

    Raises:
        UserError: for data that is missing, damaged or made for another vocabulary.
    """
    from megatron_ettin.data.blended_dataset import open_run_dataset

    dataset = open_run_dataset(config)
    ends = [end for end in (dataset.row_limit, None if count is None else first + count) if end is not None]
    while not ends or first < min(ends):
        last = min([first + ROWS_AT_ONCE, *ends])
        yield from dataset.rows(dataset.order_indices(range(first, last)))
        first = last


def train(config: Config, run_dir: AnyPath, init_from: AnyPath | None = None) -> bool:
    """Train a whole run with metrics and checkpoints, or the rest of one, as `ettin train` does (collective).

    Args:
        config: the run.
        run_dir: the run's directory; a run that has begun there is resumed.
        init_from: weights to begin from: a run, a checkpoint or a Hugging Face folder.

    Returns:
        True if the run was asked to stop before its end, False if it is done.

    Raises:
        UserError: for a run directory of another run, and for data or weights that do not fit.
    """
    from megatron_ettin.train.job import TrainArgs, prepare_jobs
    from megatron_ettin.train.trainer import Trainer

    args = TrainArgs(Path(run_dir), Path(init_from) if init_from is not None else None)
    return Trainer(prepare_jobs([(config, args)])).run()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its configuration, and its tensors, which are read unsharded."""

    path: Path
    """The checkpoint's folder."""
    config: Config
    """Configuration that it was trained with."""
    step: int
    """Number of steps trained."""
    tokens: int
    """Number of tokens trained on."""

    def names(self, optimizer: bool = False) -> list[str]:
        """Return the names of the model's tensors and, if `optimizer` is set, of the optimizer's state."""
        return [name for name in self._reader.keys() if optimizer or not name.startswith("optimizer.")]  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into host memory, unsharded and in its stored type."""
        tensor: torch.Tensor = self._reader.read(name)
        return tensor

    @functools.cached_property
    def _reader(self) -> Any:
        from megatron_ettin.checkpoint.reader import CheckpointReader

        return CheckpointReader(self.path)


def load_checkpoint(path: AnyPath, verify: bool = True) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: a checkpoint's folder, or a run (its latest checkpoint).
        verify: check the sha256 of every file first.

    Returns:
        The checkpoint. A tensor is read only when `read` is called.

    Raises:
        UserError: the folder has no checkpoint, or a damaged one.
    """
    from megatron_ettin.checkpoint import directory, integrity
    from megatron_ettin.train.resume import checkpoint_config

    folder = directory.resolve(Path(path))
    if verify:
        integrity.verify(folder)
    progress = directory.read_progress(folder)
    return Checkpoint(folder, checkpoint_config(folder), int(progress["step"]), int(progress["tokens"]))


def to_hf(
    checkpoint: AnyPath, out: AnyPath, dtype: str = "float32", verify: bool = True, objective: str | None = None
) -> dict[str, Any]:
    """Export a checkpoint as a folder that `transformers` loads.

    Args:
        checkpoint: a checkpoint's folder, or a run (its latest checkpoint).
        out: the new folder.
        dtype: type of the weights: `float32` or `bfloat16`.
        verify: read back every tensor and compare logits with those of `transformers`, in fp32 on the CPU.
        objective: `mlm` or `clm`, to export an encoder as a decoder or the reverse.

    Returns:
        `checkpoint`, `out`, `objective`, `dtype`, `step`, `files` (names of the safetensors files), `tokenizer`
        (whether there is one), `parity` and `notes`. `parity` is None without `verify`, else it has `tensors` (number
        of bit-identical tensors), `max_abs_logit_difference`, `tolerance`, `argmax_equal`, `near_ties`, `tokens` and
        `transformers` (its version).

    Raises:
        UserError: `out` exists, or the checkpoint cannot be exported.
    """
    from megatron_ettin.convert.to_hf import ExportOptions, to_hf as export
    from megatron_ettin.evaluate.inference import logits_of

    options = ExportOptions(dtype, objective, verify=verify, our_logits=logits_of if verify else None)
    return export(Path(checkpoint), Path(out), options)


def from_hf(folder: AnyPath, out: AnyPath, objective: str | None = None) -> dict[str, Any]:
    """Import a folder that `transformers` wrote as a checkpoint of weights.

    Args:
        folder: config.json and safetensors files.
        out: the new checkpoint's folder.
        objective: `mlm` or `clm`, to import an encoder as a decoder or the reverse.

    Returns:
        `source`, `out`, `objective`, `size` (the published size of this shape, or None), `tensors` (their number) and
        `notes` on what had to be assumed.

    Raises:
        UserError: `out` exists, or the folder is not a ModernBERT model that can be imported.
    """
    from megatron_ettin.convert.from_hf import from_hf as imported

    return imported(Path(folder), Path(out), objective=objective)


def evaluate(
    checkpoint: AnyPath,
    data: AnyPath | Mapping[str, AnyPath],
    rows: int | None = None,
    objective: str | None = None,
    seq_len: int | None = None,
) -> EvalResult:
    """Compute the validation loss of a model on datasets, in total and by source, in fp32 on the CPU.

    Args:
        checkpoint: a checkpoint, a run (its latest checkpoint) or a Hugging Face folder.
        data: a dataset's folder, or a mapping from names to folders.
        rows: largest number of rows to read, divided among the sources; None reads all.
        objective: `mlm`, `clm` or `mntp`; None takes the objective that the model was trained with.
        seq_len: tokens of a row; None takes the length that the model was trained with.

    Returns:
        Loss, accuracy and counts, in total and in `sources` by name.

    Raises:
        UserError: for an unknown objective, numbers out of range, and data that is missing, damaged or made with
            another tokenizer.
    """
    from megatron_ettin.convert.from_hf import as_checkpoint
    from megatron_ettin.evaluate import evaluation
    from megatron_ettin.evaluate.inference import open_evaluation

    if rows is not None and rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")
    datasets = data if isinstance(data, Mapping) else {Path(data).name: data}
    paths = {name: str(folder) for name, folder in datasets.items()}
    with (
        as_checkpoint(Path(checkpoint)) as path,
        open_evaluation(path, paths, objective, seq_len) as (train_state, held_out),
    ):
        return evaluation.evaluate(train_state, held_out, rows)


def order(run: AnyPath, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Return the documents and token spans that some steps of a run used or will use.

    Args:
        run: a run directory.
        first: the first step, counted from 1 as in metrics.jsonl.
        last: the last step, inclusive.

    Returns:
        An iterator over chunks in order, each a dict: `step` (from 1), `slot` (in the batch), `position`
        (of the row in the run), `dataset`, `row` and `chunk` (in the dataset), `source`, `document`, `document_index`,
        `start_token` and `end_token` (in the document, end exclusive), `row_start` (token of the row).

    Raises:
        UserError: for an empty range of steps, missing data, or an order that is not the one that the run recorded.
    """
    from megatron_ettin.runs import order_export

    if not 1 <= first <= last:
        raise UserError(f"steps {first} to {last}: give a first step of at least 1 and a last one that is not below it")
    config, dataset = order_export.open_run(Path(run))
    order_export.check_same_order(Path(run), dataset)
    return order_export.spans(config, dataset, range(first, last + 1))


def compare(*runs: AnyPath) -> Comparison:
    """Compare runs: are they a pair, trained on the same data by the same schedule?

    Args:
        runs: run directories; the phases of one model follow each other.

    Returns:
        `verdict` (PAIRED, NOT PAIRED, SAME TRAINING or ONE MODEL), `checks`, and `failed`: the checks that did not
        pass.

    Raises:
        UserError: for a folder that is not a run.
    """
    from megatron_ettin.report.compare import compare as compared

    return compared([Path(run) for run in runs])


def plan(config: Config, gpus: int, gpu: str = "h100", chunk_tokens: float | None = None) -> list[Planned]:
    """Predict the speed and memory of every layout that a number of GPUs can have.

    Args:
        config: the run; its layout is searched, everything else is kept.
        gpus: number of GPUs.
        gpu: `h100`, `h200`, `b200`, `a100`, `l40s`, ...
        chunk_tokens: mean number of tokens of a chunk; None takes the recipe's.

    Returns:
        The valid layouts, fastest first.

    Raises:
        UserError: for an unknown GPU.
    """
    from megatron_ettin.plan.hardware import find_gpu
    from megatron_ettin.plan.search import search
    from megatron_ettin.plan.step_time import StepModel, usual_chunk_tokens

    part = find_gpu(gpu, None)
    tokens = min(chunk_tokens or usual_chunk_tokens(config), float(config.data.seq_len))
    return search(config, gpus, StepModel(part, part.gpus_per_node, tokens))[0]
