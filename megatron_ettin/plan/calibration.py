"""Fit the step model's constants to measured runs, and report the model's error for each run.

The fit is non-negative least squares over relative errors. It is solved for every subset of the four constants. The
subset with the least error wins; of equal ones, the smallest. Communication, the optimizer's update and the fixed
seconds of a step are not fitted: they are subtracted first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.layouts import check_layout, micro_batches
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.hardware import ALIASES, TABLE, GpuSpec, find_gpu, read_table
from megatron_ettin.plan.step_time import (
    PUBLISHED,
    PUBLISHED_CHUNK_TOKENS,
    Constants,
    StepModel,
    usual_chunk_tokens,
)

Array = npt.NDArray[np.float64]

REQUIRED_KEYS = ("size", "gpus", "tokens_per_second_per_gpu")
RUN_KEYS = (*REQUIRED_KEYS, "objective", "phase", "gpu", "gpus_per_node", "chunk_tokens", "words")
# keys of a line of `ettin bench`: the first are copied, the others become overrides and the name of the GPU
BENCH_KEYS = ("size", "objective", "phase", "gpus", "tokens_per_second_per_gpu")
BENCH_BATCH_KEYS = ("micro_batch_rows", "global_batch_rows", "words", "device")
NAMES, WHOLE = ("size", "objective", "phase", "gpu"), ("gpus", "gpus_per_node")
CHOICES = [choice for n in (1, 2, 3, 4) for choice in itertools.combinations(range(4), n)]
# tokens/s per GPU of encoders on four H100, rows of 1,024 tokens; from the original's published hours for 2T tokens
PUBLISHED_RUNS = {"17m": 985e3, "32m": 655e3, "68m": 463e3, "150m": 296e3, "400m": 146e3, "1b": 64e3}


@dataclass(frozen=True)
class MeasuredRun:
    """A measured run: its configuration, and the tokens per second of each GPU."""

    name: str
    config: Config
    gpus: int
    dp: int
    model: StepModel
    tokens_per_second_per_gpu: float

    @property
    def step_seconds(self) -> float:
        """Return the measured seconds of a step, which is taken to have full rows."""
        tokens = self.config.batch.global_batch_rows * self.config.data.seq_len
        return tokens / self.gpus / self.tokens_per_second_per_gpu

    def predicted(self, constants: Constants) -> float:
        """Return the predicted tokens per second of each GPU."""
        time = dataclasses.replace(self.model, constants=constants).predict(self.config, self.dp)
        return self.tokens_per_second_per_gpu * self.step_seconds / time.total


def read_runs(path: Path, gpu: GpuSpec, own: Path | None = None) -> list[MeasuredRun]:
    """Read measured runs from a JSON list or from JSON lines, such as those of `ettin bench`.

    A run has `size`, `gpus` and `tokens_per_second_per_gpu`. It may have `objective` (default: mlm), `phase`
    (pretrain), `gpu`, `gpus_per_node`, `chunk_tokens` and `words` (its `key=value` overrides).

    Args:
        path: the file.
        gpu: GPU model of runs that name none.
        own: file with further GPU models, or None.

    Raises:
        UserError: the file, a run or a key is wrong; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = load_json(text) if text.lstrip().startswith("[") else [load_json(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate {path}: {error}") from None
    rows = [row for row in rows if not isinstance(row, dict) or row.get("state", "done") == "done"]
    if not rows:
        raise UserError(f"--calibrate {path}: holds no runs")
    runs = []
    for number, row in enumerate(rows, 1):
        try:
            runs.append(_parse_run(_from_bench_row(row, own), gpu, own))
        except UserError as error:
            raise UserError(f"--calibrate {path}: run {number}: {error}") from None
    # runs are named by the overrides that not all of them share
    overrides = [row.get("words", []) for row in rows]
    common = set.intersection(*map(set, overrides))
    names = (
        " ".join([run.name, *(word for word in given if word not in common)]) for run, given in zip(runs, overrides)
    )
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names)]


def _from_bench_row(row: Any, own: Path | None) -> Any:
    """Convert a line of `ettin bench` to a run, with its batch as overrides; return other rows unchanged."""
    if not isinstance(row, dict) or "state" not in row:
        return row
    if lacking := [key for key in (*BENCH_KEYS, *BENCH_BATCH_KEYS) if key not in row]:
        raise UserError(f"is not a complete line of `ettin bench`: it has no {lacking[0]}")
    _check_types({"words": row["words"], "gpu": row["device"]})
    batch = [f"batch.micro_batch_rows={row['micro_batch_rows']}", f"batch.global_batch_rows={row['global_batch_rows']}"]
    run = {key: row[key] for key in BENCH_KEYS} | {"words": [*row["words"], *batch, "batch.warmup_tokens=0"]}
    if chunk := row.get("attended_chunk_tokens") or row.get("chunk_tokens"):
        run["chunk_tokens"] = chunk
    names = sorted({**ALIASES, **read_table(TABLE), **(read_table(own) if own else {})}, key=len, reverse=True)
    device = row["device"].lower().replace(" ", "-")
    known = next((name for name in names if name in device), None)
    return run | ({"gpu": known} if known is not None else {})


def _parse_run(row: Any, gpu: GpuSpec, own: Path | None) -> MeasuredRun:
    if not isinstance(row, dict) or not row.keys() >= set(REQUIRED_KEYS):
        raise UserError(f"needs the keys {', '.join(REQUIRED_KEYS)}")
    if wrong := sorted(row.keys() - set(RUN_KEYS)):
        raise UserError(f"{wrong[0]!r} is not a key; the keys are {', '.join(RUN_KEYS)}")
    _check_types(row)
    config = parse(
        row["size"], row.get("objective", "mlm"), row.get("phase", "pretrain"), overrides=row.get("words", [])
    )
    dp = check_layout(config, row["gpus"])
    gpu = find_gpu(row["gpu"], own) if "gpu" in row else gpu
    chunk_tokens = row.get("chunk_tokens", usual_chunk_tokens(config))
    return MeasuredRun(
        name=f"{row['size']} {config.run.objective} on {row['gpus']}",
        config=config,
        gpus=row["gpus"],
        dp=dp,
        model=StepModel(gpu, row.get("gpus_per_node", gpu.gpus_per_node), chunk_tokens),
        tokens_per_second_per_gpu=row["tokens_per_second_per_gpu"],
    )


def _check_types(row: dict[str, Any]) -> None:
    """Raise UserError for a value that is not of its key's type, or a number that is not above 0."""
    for key, value in row.items():
        if key == "words":
            if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
                raise UserError(f"words: {value!r} is not a list of key=value")
        elif key in NAMES:
            if not isinstance(value, str):
                raise UserError(f"{key}: {value!r} is not a name")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{key}: {value!r} is not a number above 0")
        elif key in WHOLE and not isinstance(value, int):
            raise UserError(f"{key}: {value!r} is not a whole number")


def fit_constants(runs: list[MeasuredRun]) -> Constants:
    """Fit the four constants to these runs; at most as many as there are runs are above 0."""
    rows, wanted = [], []
    unfitted = Constants(0.0, 0.0, 0.0, PUBLISHED.step_seconds)
    for run in runs:
        rest = dataclasses.replace(run.model, constants=unfitted).predict(run.config, run.dp).total
        pp, vpp = run.config.parallel.pp, run.config.parallel.vpp
        # the pipeline bubble is in proportion to the fitted work
        with_bubble = 1 + (pp - 1) / (vpp * micro_batches(run.config, run.dp))
        work = np.array(run.model.busiest_rank_work(run.config, run.dp))
        rows.append(work * with_bubble / run.step_seconds)
        wanted.append(max(0.0, 1 - rest / run.step_seconds))
    best = _non_negative(np.array(rows), np.array(wanted))
    return Constants(float(best[0]), float(best[2]), float(best[1]), PUBLISHED.step_seconds, float(best[3]))


def _non_negative(a: Array, b: Array) -> Array:
    """Return the non-negative x that minimises |a x - b|, by trying every subset of columns."""
    best, least = np.zeros(a.shape[1]), float("inf")
    for choice in CHOICES:
        if len(choice) > len(b):
            continue
        x, *_ = np.linalg.lstsq(a[:, choice], b, rcond=None)
        error = float(np.linalg.norm(a[:, choice] @ x - b))
        if (x >= 0).all() and error < least - 1e-9:
            least, best = error, np.zeros(a.shape[1])
            best[list(choice)] = x
    return best


def published_runs() -> list[MeasuredRun]:
    """Return the published runs that the default constants are fitted to."""
    gpu = find_gpu("h100")
    rows = [
        {"size": size, "gpus": 4, "chunk_tokens": PUBLISHED_CHUNK_TOKENS, "tokens_per_second_per_gpu": speed}
        for size, speed in PUBLISHED_RUNS.items()
    ]
    return [_parse_run(row, gpu, None) for row in rows]


def prediction_errors(runs: list[MeasuredRun], constants: Constants) -> list[dict[str, Any]]:
    """Return the measured and predicted tokens per second of each run, and the error in percent of the measured."""
    errors = []
    for run in runs:
        measured, predicted = run.tokens_per_second_per_gpu, run.predicted(constants)
        shares = {"measured": measured, "predicted": predicted, "error_percent": 100 * (predicted / measured - 1)}
        errors.append({"run": run.name, **shares})
    return errors
