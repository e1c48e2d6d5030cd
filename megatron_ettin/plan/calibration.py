"""The step model's constants from measured runs, and how far it is from each of them.

Least squares of relative errors over every choice of the four constants, none negative; the choice with the least
error counts, of equal ones that with fewer constants. Communication, update and the seconds of a step are not fitted:
they are taken off first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.base.errors import UserError
from megatron_ettin.base.parsing import load_json
from megatron_ettin.config.layouts import check_layout, micro_batches
from megatron_ettin.config.resolve import parse
from megatron_ettin.config.schema import Config
from megatron_ettin.plan.hardware import ALIASES, TABLE, Gpu, find_gpu, read_table
from megatron_ettin.plan.step_time import (
    PUBLISHED,
    PUBLISHED_CHUNK_TOKENS,
    Constants,
    features,
    predict,
    usual_chunk_tokens,
)

NEEDED = ("size", "gpus", "tokens_per_second_per_gpu")
KNOWN = (*NEEDED, "objective", "phase", "gpu", "gpus_per_node", "chunk_tokens", "words")
OF_BENCH = ("size", "objective", "phase", "gpus", "tokens_per_second_per_gpu")  # what a line of it has, and more:
MORE_OF_BENCH = ("micro_batch_rows", "global_batch_rows", "words", "device")
NAMES, WHOLE = ("size", "objective", "phase", "gpu"), ("gpus", "gpus_per_node")
CHOICES = [choice for n in (1, 2, 3, 4) for choice in itertools.combinations(range(4), n)]
# tokens/s of each of four H100, encoders at 1,024: from the original's published hours for 2T tokens
PUBLISHED_RUNS = {"17m": 985e3, "32m": 655e3, "68m": 463e3, "150m": 296e3, "400m": 146e3, "1b": 64e3}


@dataclass(frozen=True)
class Measured:
    """One run: what it was, and the tokens a second of each GPU that came out."""

    name: str
    config: Config
    gpus: int
    gpu: Gpu
    node: int
    chunk_tokens: float
    tokens_per_second_per_gpu: float

    @property
    def dp(self) -> int:
        return check_layout(self.config, self.gpus)

    @property
    def step_seconds(self) -> float:
        tokens = self.config.batch.global_batch_rows * self.config.data.seq_len
        return tokens / self.gpus / self.tokens_per_second_per_gpu

    def predicted(self, constants: Constants) -> float:
        """Tokens a second of each GPU."""
        time = predict(self.config, self.gpu, self.dp, self.chunk_tokens, constants, self.node).total
        return self.tokens_per_second_per_gpu * self.step_seconds / time


def read_runs(path: Path, gpu: Gpu, own: Path | None = None) -> list[Measured]:
    """Runs of a JSON list, or of JSON lines: `size`, `gpus`, `tokens_per_second_per_gpu`, and where they differ from a
    pretrain encoder on `gpu`: `objective`, `phase`, `gpu`, `gpus_per_node`, `chunk_tokens`, `words` (key=value of the
    run). Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = load_json(text) if text.lstrip().startswith("[") else [load_json(one) for one in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate {path}: {error}") from None
    rows = [row for row in rows if not isinstance(row, dict) or row.get("state", "done") == "done"]
    if not rows:
        raise UserError(f"--calibrate {path}: holds no runs")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_measured(_of_bench(row, own), gpu, own))
        except UserError as error:
            raise UserError(f"--calibrate {path}: run {number}: {error}") from None
    return named_apart(found, [row.get("words", []) for row in rows])


def named_apart(runs: list[Measured], words: list[list[str]]) -> list[Measured]:
    """With the words in their names that not all of them have."""
    common = set.intersection(*map(set, words))
    names = (" ".join([run.name, *(word for word in own if word not in common)]) for run, own in zip(runs, words))
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names)]


def _of_bench(row: Any, own: Path | None) -> Any:
    """A line of `ettin bench` as a run: the batch it cut is part of its words."""
    if not isinstance(row, dict) or "state" not in row:
        return row
    if lacking := [key for key in (*OF_BENCH, *MORE_OF_BENCH) if key not in row]:
        raise UserError(f"is no whole line of `ettin bench`: it has no {lacking[0]}")
    _check_types({"words": row["words"], "gpu": row["device"]})
    batch = [f"batch.micro_batch_rows={row['micro_batch_rows']}", f"batch.global_batch_rows={row['global_batch_rows']}"]
    found = {key: row[key] for key in OF_BENCH}
    found |= {"words": [*row["words"], *batch, "batch.warmup_tokens=0"]}
    chunk = row.get("attended_chunk_tokens") or row.get("chunk_tokens")
    found |= {"chunk_tokens": chunk} if chunk else {}
    names = sorted({**ALIASES, **read_table(TABLE), **(read_table(own) if own else {})}, key=len, reverse=True)
    device = row["device"].lower().replace(" ", "-")
    part = next((name for name in names if name in device), None)
    return found | ({"gpu": part} if part is not None else {})


def _measured(row: Any, gpu: Gpu, own: Path | None) -> Measured:
    if not isinstance(row, dict) or not row.keys() >= set(NEEDED):
        raise UserError(f"has to have {', '.join(NEEDED)}")
    if wrong := sorted(row.keys() - set(KNOWN)):
        raise UserError(f"{wrong[0]!r} is no key; they are {', '.join(KNOWN)}")
    _check_types(row)
    config = parse(row["size"], row.get("objective", "mlm"), row.get("phase", "pretrain"), words=row.get("words", []))
    part = find_gpu(row["gpu"], own) if "gpu" in row else gpu
    found = Measured(
        name=f"{row['size']} {config.run.objective} on {row['gpus']}",
        config=config,
        gpus=row["gpus"],
        gpu=part,
        node=row.get("gpus_per_node", part.gpus_per_node),
        chunk_tokens=row.get("chunk_tokens", usual_chunk_tokens(config)),
        tokens_per_second_per_gpu=row["tokens_per_second_per_gpu"],
    )
    check_layout(config, found.gpus)
    return found


def _check_types(row: dict[str, Any]) -> None:
    """Names, numbers above 0, words. Raises UserError naming the key."""
    for key, value in row.items():
        if key == "words":
            if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
                raise UserError(f"words: {value!r} is no list of key=value")
        elif key in NAMES:
            if not isinstance(value, str):
                raise UserError(f"{key}: {value!r} is no name")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{key}: {value!r} is not a number above 0")
        elif key in WHOLE and not isinstance(value, int):
            raise UserError(f"{key}: {value!r} is not a whole number")


def fit(runs: list[Measured]) -> Constants:
    """Constants of these runs. No more constants than runs are fitted."""
    rows, wanted = [], []
    nothing = Constants(0.0, 0.0, 0.0, PUBLISHED.step_seconds)
    for run in runs:
        rest = predict(run.config, run.gpu, run.dp, run.chunk_tokens, nothing, run.node).total
        pp, vpp = run.config.parallel.pp, run.config.parallel.vpp
        share = features(run.config, run.gpu, run.dp, run.chunk_tokens)
        count = micro_batches(run.config, run.dp)
        longer = 1 + (pp - 1) / (vpp * count)  # the bubble is of what is fitted
        part = np.array([share.operations, share.traffic, share.token_layers, share.micro_batches]) * longer
        rows.append(part / run.step_seconds)
        wanted.append(max(0.0, 1 - rest / run.step_seconds))
    best = _non_negative(np.array(rows), np.array(wanted))
    return Constants(float(best[0]), float(best[2]), float(best[1]), PUBLISHED.step_seconds, float(best[3]))


def _non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 of least |a x - b|, found over every choice of columns."""
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


def published_runs() -> list[Measured]:
    """Return the published runs that the default constants are fitted to."""
    gpu = find_gpu("h100")
    rows = [
        {"size": size, "gpus": 4, "chunk_tokens": PUBLISHED_CHUNK_TOKENS, "tokens_per_second_per_gpu": speed}
        for size, speed in PUBLISHED_RUNS.items()
    ]
    return [_measured(row, gpu, None) for row in rows]


def report(runs: list[Measured], constants: Constants) -> list[dict[str, Any]]:
    """Measured and predicted tokens a second of each run, and the error in percent of the measured."""
    rows = []
    for run in runs:
        predicted = run.predicted(constants)
        measured = run.tokens_per_second_per_gpu
        rows.append(
            {
                "run": run.name,
                "measured": measured,
                "predicted": predicted,
                "error_percent": 100 * (predicted / measured - 1),
            }
        )
    return rows


def to_json(constants: Constants) -> dict[str, float]:
    return dataclasses.asdict(constants)
